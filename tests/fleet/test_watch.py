"""How many replicas there are, and who is replaced, by what their queues and health say."""

import asyncio
import random

import pytest

from fastserve_jax.config import load_settings
from fastserve_jax.core.routing import Router
from fastserve_jax.fleet import command
from fastserve_jax.fleet.front import Front
from fastserve_jax.fleet.replicas import Replica
from tests.fleet.kit import until


class Replicas:
    """As many as there are, ready at once."""

    def __init__(self, front, count):
        self.front, self.replicas, self.replaced, self.made = front, [], [], 0
        for _ in range(count):
            self.grow()

    def grow(self):
        name = f"r{self.made}"
        self.made += 1
        self.replicas.append(Replica(name))
        self.front.add(name, f"http://{name}")

    def retire(self, replica):
        self.replicas.remove(replica)
        self.front.remove(replica.name, is_lost=False)

    @property
    def names(self):
        return [replica.name for replica in self.replicas]

    def replace(self, name):
        self.replaced.append(name)


class Watched:
    def __init__(self, monkeypatch):
        self.waiting = {}  # by url; None does not answer
        monkeypatch.setattr(command, "LOOK_S", 0.001)
        monkeypatch.setattr(command, "SHRINK_LOOKS", 10)
        monkeypatch.setattr(command, "_waiting", self._waiting)

    async def _waiting(self, session, url):
        return self.waiting.get(url, 0.0)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


class Running:
    def __init__(self, *sets):
        self.settings = load_settings(None, sets)

    async def __aenter__(self):
        self.front = await Front(Router("least", random.sample), self.settings.server).__aenter__()
        self.replicas = Replicas(self.front, self.settings.fleet.replicas)
        watching = command._watch(self.front, self.replicas, self.settings)
        self.task = asyncio.create_task(watching)
        return self

    async def __aexit__(self, *_):
        assert not self.task.done(), self.task.exception()
        self.task.cancel()
        await self.front.__aexit__()


async def test_there_are_more_while_requests_wait_and_fewer_when_few_are_there(watched):
    async with Running("fleet.replicas=2", "fleet.max_replicas=4") as fleet:
        fleet.front.peers["r0"].in_flight = 9
        watched.waiting = {"http://r0": 30.0}
        await until(lambda: len(fleet.replicas.replicas) == 4)
        await asyncio.sleep(0.05)
        assert len(fleet.replicas.replicas) == 4, "more than the most"
        watched.waiting = {}
        await asyncio.sleep(0.05)
        assert len(fleet.replicas.replicas) == 4, "nine requests are there"
        fleet.front.peers["r0"].in_flight = 1
        await until(lambda: fleet.replicas.names == ["r0", "r1"])
        await asyncio.sleep(0.05)
        assert fleet.replicas.names == ["r0", "r1"], "fewer than asked for"


async def test_none_that_has_requests_is_taken_away(watched):
    async with Running("fleet.replicas=2", "fleet.max_replicas=4") as fleet:
        fleet.replicas.grow()
        fleet.replicas.grow()
        for name in ("r1", "r3"):
            fleet.front.peers[name].in_flight = 1
        await until(lambda: fleet.replicas.names == ["r0", "r1", "r3"])
        await asyncio.sleep(0.05)
        assert fleet.replicas.names == ["r0", "r1", "r3"], "two requests are there"
        fleet.front.peers["r3"].in_flight = 0
        await until(lambda: fleet.replicas.names == ["r0", "r1"])


async def test_one_that_is_not_ready_goes_first(watched):
    async with Running("fleet.replicas=1", "fleet.max_replicas=4") as fleet:
        fleet.replicas.replicas.append(Replica("waits for room"))
        fleet.replicas.grow()
        await until(lambda: fleet.replicas.names == ["r0", "r1"])


async def test_a_short_queue_is_no_reason(watched):
    async with Running("fleet.replicas=2", "fleet.max_replicas=4") as fleet:
        watched.waiting = {"http://r0": command.MOST_WAITING, "http://r1": command.MOST_WAITING}
        await asyncio.sleep(0.1)
        assert len(fleet.replicas.replicas) == 2


async def test_without_a_higher_number_there_are_as_many_as_asked(watched):
    async with Running("fleet.replicas=2") as fleet:
        watched.waiting = {"http://r0": 1000.0}
        await asyncio.sleep(0.1)
        assert fleet.replicas.names == ["r0", "r1"]


async def test_who_does_not_answer_for_a_while_is_replaced_once(watched):
    async with Running("fleet.replicas=2") as fleet:
        watched.waiting = {"http://r1": None}
        await until(lambda: fleet.replicas.replaced)
        await asyncio.sleep(0.05)
        assert fleet.replicas.replaced == ["r1"]
        assert list(fleet.front.peers) == ["r0"], "it is still asked"


async def test_a_moment_without_an_answer_is_none(watched, monkeypatch):
    looks = 0

    async def mostly_none(session, url):
        nonlocal looks
        looks += url == "http://r1"
        return None if url == "http://r1" and looks % command.SILENT_LOOKS else 0.0

    monkeypatch.setattr(command, "_waiting", mostly_none)
    async with Running("fleet.replicas=2") as fleet:
        await until(lambda: looks > 40)
        assert not fleet.replicas.replaced
