"""Keeps so many replicas alive on Ray: each a placement group with an actor for each of its hosts.

Where one host of a replica ends, all do, and the replica starts again, wherever there is room.
Ray places, starts and watches; here is only what belongs together. Knows no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fastserve_jax.config import FleetSettings, Settings
from fastserve_jax.group.membership import Membership

from .host import Host

MOST_WAIT_S = 30.0  # between two tries of a replica that does not become ready
STOP_S = 40.0  # for one that is asked to stop: longer than it takes to drain

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Replica:
    """`name` is another with every start: what was known of who had it is gone."""

    name: str = ""
    url: str = ""  # while it is ready
    task: asyncio.Task[None] | None = None
    hosts: tuple[Any, ...] = ()
    retiring: bool = False


class Replicas:
    """`joined` and `left` hear of every replica that is ready, and no longer, on the loop."""

    def __init__(
        self,
        reference: str,
        settings: Settings,
        cache_dir: str,
        joined: Callable[[Replica], None],
        left: Callable[[Replica, str], None],
    ) -> None:
        self._reference, self._cache_dir = reference, cache_dir
        self._fleet: FleetSettings = settings.fleet
        # Each listens where its node is, on a port of its own.
        server = dataclasses.replace(settings.server, host="0.0.0.0", port=0)
        self._settings = dataclasses.replace(settings, server=server)
        self._joined, self._left = joined, left
        self.replicas: list[Replica] = []
        self._named = 0

    def grow(self) -> Replica:
        replica = Replica()
        self.replicas.append(replica)
        replica.task = asyncio.create_task(self._keep(replica))
        return replica

    async def retire(self, replica: Replica) -> None:
        """Takes it out, lets it finish, and does not start it again."""
        replica.retiring = True
        self._leave(replica, "no longer needed")
        if replica.hosts:
            replica.hosts[0].stop.remote()
        assert replica.task is not None
        done, _ = await asyncio.wait({replica.task}, timeout=STOP_S)
        if not done:
            replica.task.cancel()
            await asyncio.wait({replica.task})
        self.replicas.remove(replica)

    def replace(self, name: str) -> None:
        """One that is there and does not answer."""
        for replica in self.replicas:
            if replica.name == name:
                for host in replica.hosts:
                    ray.kill(host)

    async def close(self) -> None:
        await asyncio.gather(*(self.retire(replica) for replica in [*self.replicas]))

    async def _keep(self, replica: Replica) -> None:
        wait_s = 1.0
        while not replica.retiring:
            replica.name, self._named = f"replica {self._named}", self._named + 1
            group = placement_group(self._bundles(), strategy=self._fleet.placement)
            try:
                was_ready = await self._live(replica, group)
            finally:
                self._end(replica, group)
            if replica.retiring:
                return
            wait_s = 1.0 if was_ready else min(2 * wait_s, MOST_WAIT_S)
            await asyncio.sleep(wait_s)

    def _bundles(self) -> list[dict[str, float]]:
        fleet = self._fleet
        one = {"CPU": fleet.cpus, "GPU": fleet.gpus, "TPU": fleet.tpus}
        return [{name: count for name, count in one.items() if count}] * fleet.hosts

    async def _live(self, replica: Replica, group: PlacementGroup) -> bool:
        """Until one of its hosts ends; whether it had been ready."""
        why = "it ended"
        try:
            await group.ready()
            replica.hosts = tuple(self._actor(group, number) for number in range(self._fleet.hosts))
            ends = [
                asyncio.ensure_future(_awaited(host.outlive.remote())) for host in replica.hosts
            ]
            ready = asyncio.ensure_future(self._ready(replica))
            try:
                await asyncio.wait({ready, *ends}, return_when=asyncio.FIRST_COMPLETED)
                if ready.done() and not any(end.done() for end in ends):
                    replica.url = ready.result()
                    self._joined(replica)
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                why = next((_reason(end) for end in ends if end.done()), why)
            finally:
                for future in (ready, *ends):
                    future.cancel()
        except RayError as error:
            why = str(error).partition("\n")[0]
        was_ready = bool(replica.url)
        if not replica.retiring:
            _log.warning("%s is gone, another is started: %s", replica.name, why)
        self._leave(replica, why)
        return was_ready

    def _actor(self, group: PlacementGroup, number: int) -> Any:
        fleet = self._fleet
        return (
            ray.remote(Host)
            .options(
                num_cpus=fleet.cpus,
                num_gpus=fleet.gpus,
                resources={"TPU": fleet.tpus} if fleet.tpus else None,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
            )
            .remote()
        )

    async def _ready(self, replica: Replica) -> str:
        first, hosts = replica.hosts[0], len(replica.hosts)
        coordinator = "" if hosts == 1 else await _awaited(first.coordinator.remote())
        for number, host in enumerate(replica.hosts):
            member = Membership(hosts, number, coordinator, "the fleet")
            host.start.remote(self._reference, self._settings, self._cache_dir, member)
        url: str = await _awaited(first.address.remote())
        return url

    def _leave(self, replica: Replica, why: str) -> None:
        if replica.url:
            replica.url = ""
            self._left(replica, why)

    def _end(self, replica: Replica, group: PlacementGroup) -> None:
        for host in replica.hosts:
            ray.kill(host)
        replica.hosts = ()
        remove_placement_group(group)


async def _awaited(reference: Any) -> Any:
    return await reference


def _reason(end: asyncio.Future[Any]) -> str:
    """The line of Ray's long answer that says it."""
    error = None if end.cancelled() else end.exception()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line or "exit" in line]
    return (telling or lines or ["it ended"])[0]
