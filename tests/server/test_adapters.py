"""Adapters as names beside their model: who answers to which, and what waits for whom."""

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from fastserve_jax.adapters import Loaded, LoadedAdapters
from fastserve_jax.core.types import Adapter
from fastserve_jax.errors import InvalidRequest, ModelFileError, ModelNotFound
from fastserve_jax.metrics import Metrics
from fastserve_jax.models.adapters import AdapterRoom
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState
from tests.server.kit import MODEL, LetterTokenizer, kit


@dataclass
class Beside:
    """Adapters that are only names."""

    loaded: dict = field(default_factory=dict)


class Engine:
    failure = None


def served(name, engine, *adapters):
    beside = Beside({own: Loaded(Adapter(i, i), own) for i, own in enumerate(adapters, 1)})
    return Served(name, engine, LetterTokenizer(), 64, adapters=beside)


def state_of(*models):
    state = ServerState(ServerConfig(), Metrics("m"))
    for model in models:
        state.put(model)
    state.ready()
    return state


async def test_names_and_whose_they_are():
    first, second = served("one", Engine(), "a", "b"), served("two", Engine(), "a", "two", "c")
    state = state_of(first, second)
    assert [own.name for own in state.models[:4]] == ["one", "two", "a", "b"]
    assert state.named(None) is first
    assert state.named("two") is second, "models before adapters"
    for name, model, index in (("a", first, 1), ("b", first, 2), ("c", second, 3)):
        own = state.model(name)
        assert (own.engine, own.parent, own.adapter.index) == (model.engine, model.name, index)
        assert own.created == model.adapters.loaded[name].created
    first.adapters.loaded.clear()
    assert state.model("a").parent == "two"
    with pytest.raises(ModelNotFound, match="'b' is not served here"):
        state.model("b")


class Holder:
    """An engine that holds adapters."""

    def __init__(self):
        self.held = {}

    adapters_in_use = property(lambda self: set(self.held))

    def add_adapter(self, adapter, arrays):
        self.held[adapter.index] = arrays

    def drop_adapter(self, adapter):
        del self.held[adapter.index]


async def test_what_is_asked_while_another_engine_takes_over_is_kept(monkeypatch, tmp_path):
    began, gate, loop = asyncio.Queue(), threading.Event(), asyncio.get_running_loop()

    def read(_, reference):
        loop.call_soon_threadsafe(began.put_nowait, reference)
        gate.wait(10)
        if reference == "bad":
            raise ModelFileError("bad")
        return reference

    monkeypatch.setattr(LoadedAdapters, "_read", read)
    wanted = {"kept": "k", "goes": "g", "other": "1"}
    old, new = (
        LoadedAdapters(Holder(), None, AdapterRoom(4, 4), None, tmp_path, wanted) for _ in "ab"
    )
    gate.set()
    await old.load_wanted()
    gate.clear()
    coming = asyncio.create_task(old.load("comes", "c"))
    taking = asyncio.create_task(new.load_wanted())
    for _ in range(5):
        await began.get()
    with pytest.raises(InvalidRequest, match="already been loaded"):
        await old.load("comes", "c")
    old.unload("kept")  # the very one that is being read
    old.unload("other")
    gate.set()
    await asyncio.gather(coming, taking)
    with pytest.raises(ModelFileError):
        await old.load("kept", "bad")
    meant = {"goes": "g", "comes": "c"}
    assert wanted == meant
    for own in (old, new):
        assert {name: held.reference for name, held in own.loaded.items()} == meant
        assert sorted(own._engine.held.values()) == ["c", "g"]


async def test_a_model_waits_for_requests_with_its_adapters():
    model, other = served("one", Engine(), "a"), served("two", Engine())
    state = state_of(model, other)
    with state.work():
        state.named("a")
        state.drop(model)
        leaving = asyncio.create_task(state.left(model))
        await asyncio.wait_for(state.left(other), 1)
        await asyncio.sleep(0.01)
        assert not leaving.done()
        with pytest.raises(ModelNotFound):
            state.model("a")
    await asyncio.wait_for(leaving, 1)


async def test_a_request_goes_with_the_adapter_that_it_names(monkeypatch):
    async with kit() as own:
        held = Loaded(Adapter(2, 7), "somewhere")
        own.state.put(
            Served(MODEL, own.engine, LetterTokenizer(), 64, adapters=Beside({"a": held}))
        )
        own.engine._adapters[2] = held.adapter
        asked = []
        submit = own.engine._scheduler.submit
        monkeypatch.setattr(
            *(own.engine._scheduler, "submit"),
            lambda request, now: asked.append(request.adapter) or submit(request, now),
        )
        for name in (MODEL, "a"):
            body = {"model": name, "prompt": "hi", "max_tokens": 3}
            assert (await own.json("/v1/completions", body))["model"] == name
        assert asked == [None, held.adapter]
        own.engine.drop_adapter(held.adapter)  # as if between the name and the stream
        fault = await own.json("/v1/completions", body, 404)
        assert "unloaded meanwhile" in fault["error"]["message"]
        await own.quiet()
