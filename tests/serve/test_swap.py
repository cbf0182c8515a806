"""Models that come and go while others are served: no request notices."""

import asyncio
import json
import shutil

import aiohttp
import jax
import numpy as np
import pytest

from fastserve_jax import roster
from fastserve_jax.client import AsyncClient
from fastserve_jax.errors import ModelNotFound
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.models.decoder import parameters
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.orbax import PARAMETERS, write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.models.test_encoder import SMALL as ENCODER
from tests.models.test_encoder import drawn, folder_of

from ..lifecycle.words import write_words
from .inside import running

SETS = (
    *("model.dtype=f32", "engine.max_slots=8", "engine.step_tokens=64", "kv.pages=64"),
    *("kv.host_pages=0", "engine.max_context=128", "server.loading=true"),
    *("engine.speculate=off",),
)
PROMPTS = [f"Once upon a time there was a {who}" for who in ("cat", "dog", "girl", "fox")]
ASKED = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Two versions of a name: tiny, and tiny that has heard some noise."""
    cache = tmp_path_factory.mktemp("cache")
    files = open_model("tiny", cache)
    shapes = {name: leaf.shape for name, leaf in parameters(Model(files.config).empty).items()}
    rng = np.random.default_rng(0)
    registry = Registry(cache / REGISTRY)
    for number in (0, 1):
        arrays = {
            name: array + number * 0.05 * rng.standard_normal(array.shape).astype(np.float32)
            for name, array in files.tensors(shapes)
        }
        write_model(cache / f"made-{number}", files.config, arrays)
        for path in files.path.glob("tokenizer*"):
            shutil.copy(path, cache / f"made-{number}")
        registry.add("tales", cache / f"made-{number}", "train")
    return cache


async def text(client, prompt, model="tales"):
    return (await client.complete(prompt, model=model, **ASKED)).choices[0].text


async def until(true):
    for _ in range(3000):
        if await true():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


async def test_a_promoted_version_takes_over_and_nobody_notices(cache, monkeypatch):
    monkeypatch.setattr(roster, "LOOK_S", 0.05)
    registry = Registry(cache / REGISTRY)
    async with running(cache, "tales", sets=SETS) as url, AsyncClient(url) as client:
        before = [await text(client, prompt) for prompt in PROMPTS]
        held = _bytes()
        (card,) = await client.models()
        assert (card.id, card.root) == ("tales", "tales@1")
        asking, stop = [], asyncio.Event()

        async def ask(at):
            said = []
            while not stop.is_set():
                prompt = PROMPTS[at % len(PROMPTS)]
                begun = (await client.models())[0].root
                said.append((begun, prompt, await text(client, prompt)))
            return said

        asking = [asyncio.create_task(ask(at)) for at in range(32)]
        await asyncio.sleep(0.2)
        registry.promote("tales@2")
        await until(lambda: _is(client, "tales@2"))
        await asyncio.sleep(0.5)
        stop.set()
        said = [one for own in await asyncio.gather(*asking) for one in own]
        after = [await text(client, prompt) for prompt in PROMPTS]
        assert set(before).isdisjoint(after)
        by_version = {
            "tales@1": dict(zip(PROMPTS, before, strict=True)),
            "tales@2": dict(zip(PROMPTS, after, strict=True)),
        }
        for begun, prompt, given in said:
            # one that began at the old version may have been taken by the new one, no other way
            allowed = {by_version["tales@2"][prompt]} | {by_version[begun][prompt]}
            assert given in allowed
        assert {begun for begun, _, _ in said} == {"tales@1", "tales@2"}
        assert any(given == by_version["tales@1"][prompt] for _, prompt, given in said)
        await until(lambda: _holds(held * 1.05))  # what took its memory, gave it back
        metrics = await _metrics(url)
        assert metrics("recompiles_after_ready_total") == 0
        finished = 'request_success_total{finished_reason="length",model_name="tales"}'
        assert metrics(finished) == len(said) + 8
        registry.rollback("tales")
        await until(lambda: _is(client, "tales@1"))
        assert [await text(client, prompt) for prompt in PROMPTS] == before


async def _is(client, root):
    return (await client.models())[0].root == root


async def _holds(most):
    return _bytes() <= most


def _bytes():
    return sum(array.nbytes for array in jax.live_arrays())


async def _metrics(url):
    async with aiohttp.ClientSession(url) as session:
        said = await (await session.get("/metrics")).text()

    def value(name):
        wanted = f"fastserve:{name}" if "{" in name else f"fastserve:{name}{{"
        (line,) = [line for line in said.splitlines() if line.startswith(wanted)]
        return float(line.split()[-1])

    return value


async def test_a_stream_that_runs_is_finished_by_the_model_it_began_with(cache):
    async with running(cache, "tales=tales@1", sets=SETS) as url, AsyncClient(url) as client:
        long = ASKED | {"max_tokens": 100}
        alone = (await client.complete(PROMPTS[0], **long)).choices[0].text
        async with client.stream_complete(PROMPTS[0], **long) as chunks:
            said = [(await anext(chunks)).choices[0].text]
            await client.load_model("tales@2", name="tales")
            assert (await client.models())[0].root == "tales@2"
            other = (await client.complete(PROMPTS[0], **long)).choices[0].text
            said += [chunk.choices[0].text async for chunk in chunks]
        assert "".join(said) == alone != other


async def test_several_models_by_name(cache, tmp_path):
    encoder = folder_of(tmp_path / "small", ENCODER, drawn(ENCODER))
    write_words(encoder, ENCODER.vocab_size)
    async with (
        running(cache, "tales=tales@2", encoder, sets=SETS) as url,
        AsyncClient(url) as client,
        aiohttp.ClientSession(url) as session,
    ):
        told = [card.id for card in await client.models()]
        assert told == ["tales", "small"]
        vectors = await _json(session, "/v1/embeddings", {"input": "the cat", "model": "small"})
        assert len(vectors["data"][0]["embedding"]) == ENCODER.hidden_size
        await _json(session, "/v1/embeddings", {"input": "the cat"}, 400)  # the first writes
        held = _bytes()
        await client.load_model(str(encoder), name="small")  # in place of the other
        await until(lambda: _holds(held))
        await client.load_model("tiny")
        both = [await text(client, PROMPTS[0], name) for name in ("tales", "tiny")]
        assert both[0] != both[1] == await text(client, PROMPTS[0], "tiny")
        await client.unload_model("tales")
        with pytest.raises(ModelNotFound, match="'small', 'tiny'"):
            await text(client, PROMPTS[0])
        assert (await client.models())[0].id == "small"
        metrics = await _metrics(url)
        assert metrics('generation_tokens_total{model_name="tiny"}') == 48


async def test_what_cannot_be_loaded_changes_nothing(cache, tmp_path):
    shutil.copytree(cache / "made-0", tmp_path / "torn")
    for file in (tmp_path / "torn" / PARAMETERS).rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:5000])
    async with (
        running(cache, "tales=tales@1", sets=SETS) as url,
        aiohttp.ClientSession(url) as session,
    ):
        for body, said in (
            ({"model": "nothing-like-it"}, "no model 'nothing-like-it'"),
            ({"model": str(tmp_path / "torn"), "name": "tales"}, "torn"),
            ({"model": "tales@9"}, "no version tales@9"),
            ({"model": "x\0y"}, "no model 'x"),
            ({"model": "x" * 5000}, "no model 'xxx"),
            ({"name": "tales"}, "model"),
        ):
            fault = await _json(session, "/models/load", body, 400)
            assert said in fault["error"]["message"]
        await _json(session, "/models/unload", {"model": "others"}, 404)
        listed = await _json(session, "/v1/models")
        assert [card["root"] for card in listed["data"]] == ["tales@1"]
        await _json(session, "/v1/completions", {"prompt": "Once", "max_tokens": 2})


async def test_loading_is_off_unless_asked_for(cache):
    sets = [own for own in SETS if "loading" not in own]
    async with running(cache, "tales", sets=sets) as url, aiohttp.ClientSession(url) as session:
        fault = await _json(session, "/models/load", {"model": "tiny"}, 403)
        assert "server.loading=true" in fault["error"]["message"]


async def _json(session, path, body=None, status=200):
    asked = session.get(path) if body is None else session.post(path, json=body)
    async with asked as answer:
        said = await answer.text()
        assert answer.status == status, said
        return json.loads(said)
