"""Adapters by name, as a person serves them: from the settings, over HTTP, across a new version,
and under the official client."""

import asyncio
import json
import shutil

import aiohttp
import numpy as np
import openai
import pytest

from fastserve_jax import assemble, fitting, roster
from fastserve_jax.errors import OperatorError
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.models.decoder import parameters
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.weights import peft

from .inside import running
from .test_swap import until

SETS = (
    *("model.dtype=f32", "engine.max_slots=4", "engine.step_tokens=16", "kv.pages=40"),
    *("kv.host_pages=0", "engine.max_context=64", "engine.speculate=off"),
)
PROMPT = "Once upon a time there was a"
ASKED = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where there are: stories, two versions of the same; a model that has the first adapter in it;
    adapters `polite`, registered, and `rude`, a folder."""
    cache = tmp_path_factory.mktemp("cache")
    files = open_model("tiny", cache)
    shapes = {name: leaf.shape for name, leaf in parameters(Model(files.config).empty).items()}
    arrays = {name: array.astype(np.float32) for name, array in files.tensors(shapes)}
    folders, registry = {}, Registry(cache / REGISTRY)
    for seed, name in enumerate(("polite", "rude"), 1):
        tensors, added = peft.draw(files.config, 4, seed, scale=0.2)
        folders[name] = peft.write(cache / name, tensors, 4)
        if name == "polite":
            models = {"stories": arrays, "merged": peft.merged(arrays, added)}
    registry.add("polite", folders["polite"], "train", parent="stories@1")
    for name, own in models.items():
        write_model(cache / "made" / name, files.config, own)
        for path in files.path.glob("tokenizer*"):
            shutil.copy(path, cache / "made" / name)
        registry.add(name, cache / "made" / name, "train")
    registry.add("stories", cache / "made" / "stories", "train")
    return cache, folders["rude"]


@pytest.fixture
def said():
    async def ask(client, model):
        return (await client.completions.create(model=model, **ASKED)).choices[0].text

    return ask


async def post(session, path, body, status=200):
    async with session.post(path, json=body) as answer:
        text = await answer.text()
        assert answer.status == status, text
        return text if status == 200 else json.loads(text)["error"]["message"]


async def test_adapters_come_and_go_beside_their_model(made, said, monkeypatch):
    monkeypatch.setattr(roster, "LOOK_S", 0.05)
    cache, rude = made
    more = ('lora.adapters=["polite"]', "lora.max_adapters=2", "lora.max_rank=4")
    loading = {"lora_name": "rude", "lora_path": str(rude)}
    async with (
        running(cache, "stories", "merged", sets=(*SETS, *more, "server.loading=true")) as url,
        aiohttp.ClientSession(url) as session,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        one, merged, polite = [await said(client, n) for n in ("stories", "merged", "polite")]
        assert one != polite == merged
        assert await post(session, "/v1/load_lora_adapter", loading) == (
            "Success: LoRA adapter 'rude' added successfully."
        )
        names = ("rude", "polite", "stories", "merged", "rude", "polite")
        both = await asyncio.gather(*(said(client, name) for name in names))
        rudely = await said(client, "rude")
        assert both == [rudely, polite, one, merged, rudely, polite]
        assert rudely not in (one, polite)
        cards = {card.id: card for card in (await client.models.list()).data}
        assert list(cards) == ["stories", "merged", "polite", "rude"]
        assert (cards["polite"].root, cards["polite"].parent) == ("polite", "stories")
        assert (cards["rude"].root, cards["rude"].parent) == (str(rude), "stories")
        assert (await client.models.retrieve("rude")).parent == "stories"
        for body, status, told in (
            (loading, 400, "'rude' has already been loaded"),
            (loading | {"lora_name": "merged"}, 400, "'merged' has already been loaded"),
            ({"lora_name": "third", "lora_path": str(rude)}, 400, "room for 2 adapters"),
            ({"lora_name": "third"}, 400, "Both 'lora_name' and 'lora_path'"),
            (loading | {"lora_name": "x", "base_model_name": "y"}, 404, "'y' is not served"),
            (loading | {"lora_name": "x", "base_model_name": "rude"}, 400, "rude is an adapter"),
        ):
            assert told in await post(session, "/v1/load_lora_adapter", body, status)
        # A version that takes over has the same adapters.
        Registry(cache / REGISTRY).promote("stories@2")
        await until(lambda: _is(client, "stories@2"))
        after = [await said(client, name) for name in ("rude", "polite", "stories")]
        assert after == [rudely, polite, one]
        unloading = {"lora_name": "rude"}
        assert "removed successfully" in await post(session, "/v1/unload_lora_adapter", unloading)
        assert "cannot be found" in await post(session, "/v1/unload_lora_adapter", unloading, 404)
        with pytest.raises(openai.NotFoundError, match="'rude' is not served here"):
            await said(client, "rude")
        absent = {"lora_name": "rude", "lora_path": "nowhere"}
        assert "no adapter 'nowhere'" in await post(session, "/v1/load_lora_adapter", absent, 404)
        await post(session, "/models/unload", {"model": "polite"})
        assert [card.id for card in (await client.models.list()).data] == ["stories", "merged"]
        # The name begins anew where no version takes over, whatever it is then.
        await post(session, "/v1/load_lora_adapter", loading)
        await post(session, "/models/unload", {"model": "stories"})
        await post(session, "/models/load", {"model": "stories@1", "name": "stories"})
        assert [card.id for card in (await client.models.list()).data] == ["merged", "stories"]
        metrics = await (await session.get("/metrics")).text()
        assert 'recompiles_after_ready_total{model_name="stories"} 0.0' in metrics


async def _is(client, root):
    return (await client.models.retrieve("stories")).root == root


async def test_without_room_or_leave_nothing_is_loaded(made, said):
    cache, rude = made
    loading = {"lora_name": "rude", "lora_path": str(rude)}
    async with running(cache, "stories", sets=SETS) as url, aiohttp.ClientSession(url) as session:
        told = await post(session, "/v1/load_lora_adapter", loading, 403)
        assert "server.loading=true" in told
        await post(session, "/v1/unload_lora_adapter", loading, 403)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["lora.adapters=['x=nowhere']"], "no adapter 'nowhere'"),
        (["lora.adapters=['x=stories']"], "no adapter 'stories'"),
        (["lora.adapters=['x=polite', 'x=polite']"], "each name once"),
        (["lora.adapters=['a=polite', 'b=polite']", "lora.max_adapters=1"], "max_adapters is 1"),
        (["lora.adapters=['polite']", "mesh.cpu_devices=2"], "served on one device"),
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_compiled(made, monkeypatch, sets, told):
    monkeypatch.setattr(assemble, "_compiled", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(assemble, "divide_cpu", lambda _: None)
    monkeypatch.setattr(fitting.jax, "device_count", lambda: 2 if len(sets) == 2 else 1)
    with pytest.raises(OperatorError, match=told):
        async with running(made[0], "stories", sets=(*SETS, *sets)):
            pytest.fail("it is ready")
