"""What follows a registered name, and people who load and unload meanwhile: they have the last
word."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from fastserve_jax import roster
from fastserve_jax.errors import DoesNotFit
from fastserve_jax.metrics import Metrics
from fastserve_jax.roster import Roster
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.state import ServerState

from .test_swap import until


class Hosting:
    """Of models that are only names; opening one takes until `gate` is set."""

    def __init__(self):
        self.gate, self.opened, self.open, self.full = asyncio.Event(), [], set(), set()
        self.gate.set()

    @asynccontextmanager
    async def host(self, reference, name):
        self.opened.append(reference)
        await self.gate.wait()
        if reference in self.full:
            raise DoesNotFit("no room")
        root = reference if "@" in reference else f"{reference}@1"
        self.open.add(root)
        try:
            yield SimpleNamespace(name=name or reference, root=root, engine=object())
        finally:
            self.open.discard(root)

    def forget(self, name):
        pass


@pytest.fixture
async def world(monkeypatch, tmp_path):
    """A roster that follows `tales`, whose current version is in `current`."""
    current = {"tales": 1}
    monkeypatch.setattr(roster, "LOOK_S", 0.005)
    monkeypatch.setattr(roster.Registry, "current", lambda _, name: current.get(name))
    own = Roster(ServerState(ServerConfig(), Metrics("tales")), Hosting())
    await own.load("tales")
    following = asyncio.create_task(own.follow(tmp_path))
    yield own, current
    following.cancel()
    await own.close()
    assert not own.hosting.open


def roots(own):
    return {served.name: served.root for served in own.state._models.values()}


async def loading(own, current, number):
    """The version is being loaded now, and will not be before the gate is set."""
    own.hosting.gate.clear()
    current["tales"] = number
    await reached(lambda: own.hosting.opened[-1] == f"tales@{number}")


async def reached(true):
    async def is_true():
        return true()

    await until(is_true)


async def test_what_is_unloaded_stays_so(world):
    own, current = world
    await loading(own, current, 2)
    await own.unload("tales")
    own.hosting.gate.set()
    await reached(lambda: not own.hosting.open)
    await asyncio.sleep(0.05)
    assert roots(own) == {}


async def test_what_is_loaded_under_the_name_stays(world):
    own, current = world
    own.hosting.gate.clear()
    other = asyncio.create_task(own.load("other", "tales"))
    await reached(lambda: own.hosting.opened[-1] == "other")
    current["tales"] = 2
    await asyncio.sleep(0.05)  # it waits for its turn
    own.hosting.gate.set()
    await other
    await asyncio.sleep(0.05)
    assert roots(own) == {"tales": "other@1"}
    assert own.hosting.opened == ["tales", "other"]


async def test_what_failed_is_tried_again(world, monkeypatch):
    own, current = world
    own.hosting.full.add("tales@2")
    current["tales"] = 2
    await reached(lambda: own.hosting.opened[-1] == "tales@2")
    await asyncio.sleep(0.05)
    assert own.hosting.opened == ["tales", "tales@2"], "not at every look"
    own.hosting.full.clear()
    current["tales"] = 1
    await asyncio.sleep(0.05)
    current["tales"] = 2  # promoted again
    await reached(lambda: roots(own) == {"tales": "tales@2"})
    own.hosting.full.add("tales@3")
    current["tales"] = 3
    await reached(lambda: own.hosting.opened[-1] == "tales@3")
    own.hosting.full.clear()
    monkeypatch.setattr(roster, "AGAIN_S", 0.0)  # a minute later
    await reached(lambda: roots(own) == {"tales": "tales@3"})


async def test_at_the_end_nothing_more_is_loaded(world):
    own, current = world
    await loading(own, current, 2)
    waiting = asyncio.create_task(own.load("other"))
    await asyncio.sleep(0)
    await own.close()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert own.hosting.opened == ["tales", "tales@2"]
