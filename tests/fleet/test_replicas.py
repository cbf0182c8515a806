"""What keeps replicas, on a Ray that is played: what is tried again, what not, and how it ends."""

import asyncio
import logging
import time

import pytest

from fastserve_jax.config import load_settings
from fastserve_jax.errors import ConfigError, OperatorError
from fastserve_jax.fleet import command
from fastserve_jax.fleet import replicas as module
from fastserve_jax.fleet.host import End
from fastserve_jax.fleet.replicas import Replicas
from tests.fleet.kit import until


class Method:
    def __init__(self, call):
        self.remote = call


class Host:
    """Ready at once; ends as it is told."""

    def __init__(self, end=None):
        self.end = asyncio.get_running_loop().create_future()
        self.is_asked_to_stop = False
        self.start = Method(lambda *_: None)
        self.outlive = Method(lambda: self.end)
        self.address = Method(lambda: asyncio.sleep(0.001, "http://a"))
        self.stop = Method(self._stop)
        if end is not None:
            self.end.set_result(end)

    def _stop(self):
        self.is_asked_to_stop = True


class Group:
    def __init__(self, has_room):
        self._has_room = has_room

    async def ready(self):
        await self._has_room.wait()


class Played:
    """`ends` of starts to come, as they are made; None goes on."""

    def __init__(self, monkeypatch, *ends, count=1):
        self.ends, self.hosts, self.said, self.groups = list(ends), [], [], 0
        self.has_room = asyncio.Event()
        self.has_room.set()
        monkeypatch.setattr(module, "placement_group", self._group)
        monkeypatch.setattr(module, "remove_placement_group", self._removed)
        monkeypatch.setattr(module.ray, "kill", lambda host: host.end.cancel())
        monkeypatch.setattr(Replicas, "_actor", lambda *_: self._host())
        monkeypatch.setattr(module, "MOST_WAIT_S", 0.001)
        left = lambda replica, why: self.said.append((replica.name, why))  # noqa: E731
        joined = lambda replica: self.said.append((replica.name, "ready"))  # noqa: E731
        self.replicas = Replicas("model", load_settings(), "", joined, left)
        for _ in range(count):
            self.replicas.grow()

    def _group(self, bundles, strategy):
        self.groups += 1
        return Group(self.has_room)

    def _removed(self, group):
        self.groups -= 1

    def _host(self):
        self.hosts.append(Host(self.ends.pop(0) if self.ends else None))
        return self.hosts[-1]

    async def says(self, *said):
        await until(lambda: self.said == [*said])


LOST = End(1, "it is lost")


async def test_one_that_ends_starts_again_under_another_name(monkeypatch):
    played = Played(monkeypatch, LOST)
    await played.says(("replica 0", "it is lost"), ("replica 1", "ready"))
    played.hosts[1].end.set_result(LOST)
    await until(lambda: len(played.hosts) == 3)
    assert played.said[2] == ("replica 1", "it is lost")
    await stopped(played)


async def stopped(played):
    """All of it, and nothing of Ray's is kept."""
    closing = asyncio.create_task(played.replicas.close())
    await asyncio.sleep(0.01)
    for host in played.hosts:
        if host.is_asked_to_stop and not host.end.done():
            host.end.set_result(End(0, "it stopped"))
    async with asyncio.timeout(5):
        await closing
    assert played.groups == 0


async def test_what_a_person_must_mend_is_not_tried_again(monkeypatch):
    played = Played(monkeypatch, End(2, "it does not fit"))
    with pytest.raises(OperatorError, match="it does not fit"):
        async with asyncio.timeout(5):
            await played.replicas.failed
    assert len(played.hosts) == 1
    await stopped(played)


async def test_what_worked_once_is_tried_again(monkeypatch):
    """A node may be unlike the others, or a disk full for a while."""
    played = Played(monkeypatch)
    await played.says(("replica 0", "ready"))
    played.ends = [End(2, "no space")]
    played.hosts[0].end.set_result(LOST)
    await until(lambda: len(played.hosts) == 3)
    assert not played.replicas.failed.done()
    await stopped(played)


async def test_what_ray_does_not_take_is_said_and_tried_again(monkeypatch, caplog):
    played = Played(monkeypatch, count=0)

    def refuses(*_, **__):
        monkeypatch.setattr(module, "placement_group", played._group)
        raise ValueError("bundles cannot be empty")

    monkeypatch.setattr(module, "placement_group", refuses)
    played.replicas.grow()
    await played.says(("replica 0", "bundles cannot be empty"), ("replica 1", "ready"))
    assert "replica 0 cannot be kept" in caplog.text
    await stopped(played)


async def test_one_without_room_says_so_and_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(module, "ROOM_S", 0.01)
    caplog.set_level(logging.WARNING)
    played = Played(monkeypatch, count=0)
    played.has_room.clear()
    played.replicas.grow()
    await until(lambda: "replica 0 waits for room" in caplog.text)
    assert "1 x {'CPU': 1.0}" in caplog.text
    began = time.monotonic()
    await stopped(played)
    assert time.monotonic() - began < 1
    assert played.said == [("replica 0", "no longer needed")]


async def test_one_that_retires_finishes_first_and_is_given_up_after_a_while(monkeypatch):
    monkeypatch.setattr(module, "STOP_S", 0.05)
    played = Played(monkeypatch)
    await played.says(("replica 0", "ready"))
    (replica,) = played.replicas.replicas
    played.replicas.retire(replica)
    assert played.said[1:] == [("replica 0", "no longer needed")]
    await asyncio.sleep(0.01)
    assert played.hosts[0].is_asked_to_stop
    assert not played.hosts[0].end.done()
    async with asyncio.timeout(5):
        await played.replicas.close()
    assert played.hosts[0].end.cancelled()
    assert (len(played.hosts), played.groups) == (1, 0)


async def test_what_fails_in_watching_ends_the_fleet(monkeypatch):
    async def fails(*_):
        raise KeyError("a bug")

    played = Played(monkeypatch, count=0)
    monkeypatch.setattr(command, "_watch", fails)
    settings = load_settings(None, ["server.port=0"])
    running = command._run("model", settings, None, asyncio.Event())
    with pytest.raises(KeyError):
        async with asyncio.timeout(5):
            await running
    assert played.groups == 0


def test_chips_that_nobody_takes_are_named():
    chips = {"CPU": 8.0, "GPU": 4.0}
    with pytest.raises(ConfigError, match=r"4 GPUs here, and fleet\.gpus is 0.*fleet\.gpus=1"):
        command._check_accelerators(chips, load_settings().fleet, {})
    command._check_accelerators(chips, load_settings().fleet, {"JAX_PLATFORMS": "cpu"})
    command._check_accelerators(chips, load_settings(None, ["fleet.gpus=1"]).fleet, {})
    command._check_accelerators({"CPU": 8.0}, load_settings().fleet, {})
