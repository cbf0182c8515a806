"""`fastserve fleet`: joins or starts Ray, keeps the replicas, and listens before them.

How many there are follows the queue: one more while requests wait, one less while few are there.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
from pathlib import Path

import aiohttp
import ray
from aiohttp import web

from fastserve_jax.config import Settings
from fastserve_jax.core.routing import Router
from fastserve_jax.errors import ConfigError
from fastserve_jax.terminal import Bars, console
from fastserve_jax.weights.load import open_config

from .front import Front
from .replicas import Replica, Replicas

LOOK_S = 2.0  # from one look at the queues to the next
MOST_WAITING = 4.0  # requests of each replica that wait, before there is one more
GROW_LOOKS, SHRINK_LOOKS, SILENT_LOOKS = 5, 30, 4  # that agree
_WAITING = re.compile(rb"^fastserve:num_requests_waiting{[^}]*} (\S+)$", re.M)


async def run_fleet(reference: str, settings: Settings, cache_dir: Path, ray_address: str) -> int:
    """Until a signal. Returns the exit status; raises ConfigError."""
    fleet = settings.fleet
    with Bars() as bars:  # what cannot be served is found here, and not by each of them
        open_config(reference, cache_dir, bars.pull)
    _join(ray_address)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for kind in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(kind, stop.set)
    async with Front(Router(fleet.router, random.sample), settings.server.max_body_bytes) as front:

        def joined(replica: Replica) -> None:
            front.add(replica.name, replica.url)
            console.print(f"{replica.name} is ready at {replica.url}", highlight=False)

        def left(replica: Replica, why: str) -> None:
            front.remove(replica.name)
            console.print(f"{replica.name} is gone: {why}", highlight=False)

        replicas = Replicas(reference, settings, str(cache_dir), joined, left)
        async with _listening(front, settings) as url:
            for _ in range(fleet.replicas):
                replicas.grow()
            console.print(f"{fleet.replicas} replicas of {reference}, at {url}", highlight=False)
            watching = asyncio.create_task(_watch(front, replicas, settings))
            await stop.wait()
            watching.cancel()
            console.print("stopping")
            await replicas.close()
    ray.shutdown()
    return 0


def _join(address: str) -> None:
    try:
        ray.init(address or None, log_to_driver=True, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray at {address!r}: {error}") from error


class _listening:
    def __init__(self, front: Front, settings: Settings) -> None:
        self._runner = web.AppRunner(front.app(), handler_cancellation=True, access_log=None)
        self._host, self._port = settings.server.host, settings.server.port

    async def __aenter__(self) -> str:
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._host}:{self._port}: {error}") from error
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


async def _watch(front: Front, replicas: Replicas, settings: Settings) -> None:
    """Replaces who does not answer, and keeps as many as the queues want."""
    least = settings.fleet.replicas
    most = max(least, settings.fleet.max_replicas)
    silent: dict[str, int] = {}
    crowded = idle = 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LOOK_S)) as session:
        while True:
            await asyncio.sleep(LOOK_S)
            urls = dict(front.urls)
            looks = await asyncio.gather(*(_waiting(session, url) for url in urls.values()))
            found = dict(zip(urls, looks, strict=True))
            silent = {name: silent.get(name, 0) + 1 for name, look in found.items() if look is None}
            for name, times in silent.items():
                if times == SILENT_LOOKS:
                    console.print(f"{name} does not answer and is replaced", highlight=False)
                    front.remove(name)
                    replicas.replace(name)
            waiting = sum(look or 0.0 for look in looks)
            there, busy = len(replicas.replicas), sum(front.in_flight.values())
            crowded = crowded + 1 if urls and waiting / len(urls) > MOST_WAITING else 0
            idle = idle + 1 if busy < there - 1 else 0
            if crowded >= GROW_LOOKS and len(urls) == there < most:
                crowded = 0
                console.print(f"{waiting:.0f} requests wait: {there + 1} replicas")
                replicas.grow()
            elif idle >= SHRINK_LOOKS and there > least:
                idle = 0
                console.print(f"{busy} requests are there: {there - 1} replicas")
                await replicas.retire(replicas.replicas[-1])


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
