"""`fastserve serve FOLDER` of an encoder-decoder: OpenAI's client gets the numpy oracle's texts."""

import asyncio

import openai
import pytest

from fastserve_jax.text.load import load_tokenizer
from tests.models.t5 import Oracle, words, write_folder
from tests.serve.conftest import started

SOURCES = words(7)[:6]
SETS = ("model.dtype=f32", "engine.max_slots=4", "engine.step_tokens=16", "kv.page_size=4")


@pytest.fixture(scope="module")
def served(tmp_path_factory, cache):
    """-> the server, its tokenizer, the oracle."""
    folder = tmp_path_factory.mktemp("seq2seq") / "t5"
    config, tensors = write_folder(folder, "flan-t5", n_positions=40)
    sets = [flag for name in SETS for flag in ("--set", name)]
    with started(folder, cache, *sets) as server:
        yield server, load_tokenizer(folder), Oracle(config, tensors)


@pytest.fixture
async def client(served):
    async with openai.AsyncOpenAI(base_url=f"{served[0].url}/v1", api_key="none") as client:
        yield client


async def test_everybody_at_once_gets_the_oracle_s_text(served, client):
    _, tokenizer, oracle = served

    async def one(source):
        answer = await client.completions.create(
            model="t5", prompt=source, max_tokens=12, logprobs=1
        )
        return answer

    answers = await asyncio.gather(*map(one, SOURCES))
    for source, answer in zip(SOURCES, answers, strict=True):
        ids = tokenizer.encode(source)
        tokens, logprobs = oracle.greedy(ids, 12)
        assert answer.choices[0].text == tokenizer.decode(tokens)
        got = answer.choices[0].logprobs.token_logprobs
        assert got == pytest.approx(logprobs[: len(got)], abs=2e-4)
        assert answer.usage.prompt_tokens == len(ids) + 1


async def test_streamed_ids_are_the_same(served, client):
    _, tokenizer, oracle = served
    ids = tokenizer.encode(SOURCES[0])
    stream = await client.completions.create(model="t5", prompt=ids, max_tokens=9, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    assert text == tokenizer.decode(oracle.greedy(ids, 9)[0])


async def test_what_it_cannot_do_is_said(client):
    ask = client.completions.create
    with pytest.raises(openai.BadRequestError, match="an encoder reads at most 40 in one step"):
        await ask(model="t5", prompt=[5] * 41, max_tokens=2)
    with pytest.raises(openai.BadRequestError, match="logprobs with echo"):
        await ask(model="t5", prompt=SOURCES[0], max_tokens=2, echo=True, logprobs=1)
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
        await client.chat.completions.create(
            model="t5", messages=[{"role": "user", "content": "to"}], max_tokens=2
        )
