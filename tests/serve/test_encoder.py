"""An encoder as people serve it: OpenAI's client, numpy's numbers, labels, and errors."""

import contextlib

import aiohttp
import numpy as np
import openai
import pytest

from fastserve_jax.models.encoder import EncoderConfig
from fastserve_jax.text.wordpiece import load_wordpiece
from fastserve_jax.weights.load import find_encoder
from fastserve_jax.weights.orbax import write_model
from tests.lifecycle.words import write_words
from tests.models.test_encoder import SMALL, drawn, folder_of, oracle

from .inside import running

TEXTS = ["the cat sat", "a dog", "the cat sat on the mat and the dog did not"]


@contextlib.asynccontextmanager
async def served(folder, cache):
    """A session, and its URL."""
    async with running(cache, folder) as url, aiohttp.ClientSession(url) as session:
        yield session, url


@pytest.fixture
def folder(tmp_path):
    made = folder_of(tmp_path / "small", SMALL, drawn(SMALL))
    write_words(made, SMALL.vocab_size)
    return made


async def test_vectors(folder, tmp_path):
    words = load_wordpiece(folder)
    ids = [words.encode(text) for text in TEXTS]
    wanted = [oracle(SMALL, drawn(SMALL), own) for own in ids]
    async with served(folder, tmp_path) as (session, url):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        async with client:  # asks for base64 by itself
            answer = await client.embeddings.create(model="small", input=TEXTS)
            by_tokens = await client.embeddings.create(model="small", input=ids)
            short = await client.embeddings.create(model="small", input=TEXTS[0], dimensions=8)
        found = [item.embedding for item in answer.data]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert [item.embedding for item in by_tokens.data] == found
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        assert np.linalg.norm(short.data[0].embedding) == pytest.approx(1, abs=1e-5)
        assert len(short.data[0].embedding) == 8
        body = {"text_1": TEXTS[0], "text_2": TEXTS}
        async with session.post("/score", json=body) as scored:
            scores = [one["score"] for one in (await scored.json())["data"]]
        np.testing.assert_allclose(scores, np.array(wanted) @ wanted[0], atol=1e-4)
        models = await (await session.get("/v1/models")).json()
        assert models["data"][0]["max_model_len"] == SMALL.max_context
        metrics = await (await session.get("/metrics")).text()
        assert 'recompiles_after_ready_total{model_name="small"} 0.0' in metrics
        await refused(session)


async def refused(session):
    for path, body, status, said in (
        ("/v1/embeddings", {"input": []}, 400, "must not be empty"),
        ("/v1/embeddings", {"input": ["a", 1]}, 400, "mixes"),
        ("/v1/embeddings", {"input": [100]}, 400, "token ids must be between 0 and 99"),
        ("/v1/embeddings", {"input": "cat " * 100}, 400, "more than the context of 24"),
        ("/v1/embeddings", {"input": "a", "dimensions": 99}, 400, "32 dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "float or base64"),
        ("/v1/embeddings", {"input": "a", "model": "large"}, 404, "not served here"),
        ("/classify", {"input": "a"}, 400, "was taught no labels"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "as many as"),
        ("/v1/completions", {"prompt": "a"}, 400, "is an encoder"),
    ):
        async with session.post(path, json=body) as answer:
            assert answer.status == status, (path, body)
            assert said in (await answer.json())["error"]["message"]


async def test_labels(folder, tmp_path):
    config = EncoderConfig(100, 32, 2, 4, 64, 24, 1e-12, labels=("bad", "fine", "good"))
    arrays = drawn(config, seed=3)
    own = tmp_path / "labels"
    write_model(own, config, {n: a.astype(np.float32) for n, a in arrays.items()})
    write_words(own, config.vocab_size)
    assert find_encoder(str(own), tmp_path).config == config
    unnormed = EncoderConfig(100, 32, 2, 4, 64, 24, 1e-12, is_normed=False)
    pooled = [oracle(unnormed, arrays, load_wordpiece(own).encode(text)) for text in TEXTS]
    logits = np.array(pooled) @ arrays["classifier.weight"].T + arrays["classifier.bias"]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    async with served(own, tmp_path) as (session, _):
        async with session.post("/classify", json={"input": TEXTS}) as answer:
            found = (await answer.json())["data"]
        np.testing.assert_allclose([one["probs"] for one in found], shares, atol=1e-4)
        assert [one["label"] for one in found] == [config.labels[i] for i in logits.argmax(1)]
        async with session.post("/v1/embeddings", json={"input": "a"}) as answer:
            assert "is a classifier" in (await answer.json())["error"]["message"]
