"""`fastserve fleet`: joins or starts Ray, keeps the replicas, and listens before them.

How many there are follows the queue: one more while requests wait, one less while few are there.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import ray

from fastserve_jax.config import FleetSettings, Settings
from fastserve_jax.core.routing import Router
from fastserve_jax.errors import ConfigError
from fastserve_jax.server.lifecycle import app_listening
from fastserve_jax.terminal import Bars, console
from fastserve_jax.weights.load import open_config

from .front import Front
from .replicas import Replica, Replicas

LOOK_S = 2.0  # from one look at the queues to the next
MOST_WAITING = 4.0  # requests of each replica that wait, before there is one more
GROW_LOOKS, SHRINK_LOOKS, SILENT_LOOKS = 5, 30, 4  # that agree
_WAITING = re.compile(rb"^fastserve:num_requests_waiting{[^}]*} (\S+)$", re.M)


async def run_fleet(reference: str, settings: Settings, cache_dir: Path, ray_address: str) -> int:
    """Until a signal. Returns the exit status; raises OperatorErrors."""
    if settings.server.loading:  # by one replica, and not by the others
        raise ConfigError("a fleet serves the one model: leave server.loading out")
    with Bars() as bars:  # what cannot be served is found here, and not by each of them
        open_config(reference, cache_dir, bars.pull)
    _join(ray_address)
    stop = asyncio.Event()
    for kind in (signal.SIGTERM, signal.SIGINT):  # after Ray, which takes them for itself
        asyncio.get_running_loop().add_signal_handler(kind, stop.set)
    try:
        _check_accelerators(ray.cluster_resources(), settings.fleet, os.environ)
        await _run(reference, settings, cache_dir, stop)
    finally:
        ray.shutdown()
    return 0


def _join(address: str) -> None:
    try:
        ray.init(address or "local", log_to_driver=True, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray at {address!r}: {error}") from error


def _check_accelerators(
    there: Mapping[str, float], fleet: FleetSettings, environment: Mapping[str, str]
) -> None:
    """Replicas that take none would serve on CPUs, without a word. Raises ConfigError."""
    if fleet.gpus or fleet.tpus or environment.get("JAX_PLATFORMS") == "cpu":
        return
    for name in ("GPU", "TPU"):
        if there.get(name):
            setting = f"fleet.{name.lower()}s"
            raise ConfigError(
                f"Ray has {there[name]:.0f} {name}s here, and {setting} is 0: say how many a host "
                f"of a replica takes, --set {setting}=1, or JAX_PLATFORMS=cpu to serve without"
            )


async def _run(reference: str, settings: Settings, cache_dir: Path, stop: asyncio.Event) -> None:
    """Until `stop`; raises what ends it before."""
    async with Front(Router(settings.fleet.router, random.sample), settings.server) as front:

        def joined(replica: Replica) -> None:
            front.add(replica.name, replica.url)
            console.print(f"{replica.name} is ready at {replica.url}")

        def left(replica: Replica, why: str) -> None:
            front.remove(replica.name, is_lost=not replica.is_retiring)
            console.print(f"{replica.name} is gone: {why}", markup=False)

        replicas = Replicas(reference, settings, str(cache_dir), joined, left)
        async with app_listening(front.app(), settings.server) as url:
            count = settings.fleet.replicas
            for _ in range(count):
                replicas.grow()
            console.print(f"{count} replicas of {reference}, at {url}")
            watching = asyncio.create_task(_watch(front, replicas, settings))
            stopping = asyncio.create_task(stop.wait())
            ends: set[asyncio.Future[Any]] = {stopping, watching, replicas.failed}
            try:
                ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ended:
                    end.result()
            finally:
                console.print("stopping")
                watching.cancel()
                stopping.cancel()
                front.stop()
                await replicas.close()


async def _watch(front: Front, replicas: Replicas, settings: Settings) -> None:
    """Replaces who does not answer, and keeps as many as the queues want."""
    least = settings.fleet.replicas
    most = max(least, settings.fleet.max_replicas)
    silent: dict[str, int] = {}
    crowded = idle = 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LOOK_S)) as session:
        while True:
            await asyncio.sleep(LOOK_S)
            peers = [*front.peers.values()]
            looks = await asyncio.gather(*(_waiting(session, peer.url) for peer in peers))
            found = {peer.name: look for peer, look in zip(peers, looks, strict=True)}
            silent = {name: silent.get(name, 0) + 1 for name, look in found.items() if look is None}
            for name, times in silent.items():
                if times == SILENT_LOOKS:
                    console.print(f"{name} does not answer and is replaced")
                    front.remove(name, is_lost=True)
                    replicas.replace(name)
            waiting = sum(look or 0.0 for look in looks)
            there, busy = len(replicas.replicas), front.in_flight
            crowded = crowded + 1 if peers and waiting / len(peers) > MOST_WAITING else 0
            idle = idle + 1 if busy < there - 1 else 0
            if crowded >= GROW_LOOKS and len(peers) == there < most:
                crowded = 0
                console.print(f"{waiting:.0f} requests wait: {there + 1} replicas")
                replicas.grow()
            elif idle >= SHRINK_LOOKS and there > least:
                replica = _idle(front, replicas)
                if replica is not None:
                    idle = 0
                    console.print(f"{busy} requests are there: {there - 1} replicas")
                    replicas.retire(replica)


def _idle(front: Front, replicas: Replicas) -> Replica | None:
    """One that does nothing for anybody; one that is not ready before any other, then the last."""

    def in_flight(replica: Replica) -> int:
        peer = front.peers.get(replica.name)
        return -1 if peer is None else peer.in_flight

    found = min(reversed(replicas.replicas), key=in_flight)
    return found if in_flight(found) <= 0 else None


async def _waiting(session: aiohttp.ClientSession, url: str) -> float | None:
    """Requests in its queue; None where it does not answer, or its engine has stopped."""
    try:
        async with session.get(f"{url}/health") as answer:
            if answer.status != 200:
                return None
        async with session.get(f"{url}/metrics") as answer:
            found = _WAITING.search(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
    return float(found[1]) if found else 0.0
