"""Keeps so many replicas alive on Ray: each a placement group with an actor for each of its hosts.

Where one host of a replica ends, all do, and the replica starts again, wherever there is room; but
not what a person must mend before any replica was ready. Ray places, starts and watches; here is
only what belongs together. Knows no requests.
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
from fastserve_jax.errors import OperatorError
from fastserve_jax.group.membership import Membership

from .host import End, Host

MOST_WAIT_S = 30.0  # between two tries of a replica that does not become ready
ROOM_S = 10.0  # before it is said that there is none
STOP_S = 40.0  # for one that is asked to stop: longer than it takes to drain

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Replica:
    """`name` is another with every start: what was known of who had it is gone."""

    name: str = ""
    url: str = ""  # while it is ready
    task: asyncio.Task[None] | None = None
    hosts: tuple[Any, ...] = ()
    is_retiring: bool = False


class Replicas:
    """`joined` hears of every start that is ready, `left` of every one that ends, on the loop;
    `failed` raises what a person must mend."""

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
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._retiring: set[asyncio.Task[None]] = set()
        self._named = 0
        self._was_ready = False  # any of them, ever

    def grow(self) -> None:
        replica = Replica()
        self.replicas.append(replica)
        replica.task = asyncio.create_task(self._keep(replica))

    def retire(self, replica: Replica) -> None:
        """Takes it out, lets it finish, which takes a while, and does not start it again."""
        task = replica.task
        assert task is not None
        replica.is_retiring = True
        self.replicas.remove(replica)
        self._leave(replica, "no longer needed")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        if replica.hosts:
            replica.hosts[0].stop.remote()
            asyncio.get_running_loop().call_later(STOP_S, task.cancel)
        else:
            task.cancel()

    def replace(self, name: str) -> None:
        """One that is there and does not answer."""
        for replica in self.replicas:
            if replica.name == name:
                for host in replica.hosts:
                    ray.kill(host)

    async def close(self) -> None:
        for replica in [*self.replicas]:
            self.retire(replica)
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def _keep(self, replica: Replica) -> None:
        wait_s = 1.0
        while not replica.is_retiring:
            replica.name, self._named = f"replica {self._named}", self._named + 1
            end, was_ready = End(1, "it was not kept"), False
            try:
                end = await self._live(replica)
            except RayError as error:
                end = End(1, str(error).partition("\n")[0])
            except Exception as error:  # tried again: nobody else would
                _log.exception("%s cannot be kept", replica.name)
                end = End(1, str(error))
            finally:
                was_ready = bool(replica.url)
                self._leave(replica, end.why)
            if end.status == OperatorError.exit_status and not self._was_ready:
                if not self.failed.done():
                    self.failed.set_exception(OperatorError(end.why))
                return
            wait_s = 1.0 if was_ready else min(2 * wait_s, MOST_WAIT_S)
            await asyncio.sleep(wait_s)

    def _bundles(self) -> list[dict[str, float]]:
        fleet = self._fleet
        one = {"CPU": fleet.cpus, "GPU": fleet.gpus, "TPU": fleet.tpus}
        return [{name: count for name, count in one.items() if count}] * fleet.hosts

    async def _live(self, replica: Replica) -> End:
        """Until one of its hosts ends."""
        group = placement_group(self._bundles(), strategy=self._fleet.placement)
        try:
            await self._room(replica, group)
            replica.hosts = tuple(self._actor(group, number) for number in range(self._fleet.hosts))
            ends = [
                asyncio.ensure_future(_awaited(host.outlive.remote())) for host in replica.hosts
            ]
            ready = asyncio.ensure_future(self._ready(replica))
            try:
                await asyncio.wait({ready, *ends}, return_when=asyncio.FIRST_COMPLETED)
                is_ready = ready.done() and not any(end.done() for end in ends)
                if is_ready and not replica.is_retiring:
                    replica.url, self._was_ready = ready.result(), True
                    self._joined(replica)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                return next(_end(end) for end in ends if end.done())
            finally:
                for future in (ready, *ends):
                    future.cancel()
        finally:
            for host in replica.hosts:
                ray.kill(host)
            replica.hosts = ()
            remove_placement_group(group)

    async def _room(self, replica: Replica, group: PlacementGroup) -> None:
        room = asyncio.ensure_future(_awaited(group.ready()))
        try:
            await asyncio.wait({room}, timeout=ROOM_S)
            if not room.done():
                wanted = f"{self._fleet.hosts} x {self._bundles()[0]}"
                _log.warning("%s waits for room on Ray's nodes: it wants %s", replica.name, wanted)
            await room
        finally:
            room.cancel()

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
        """Once for every start."""
        if replica.name:
            self._left(replica, why)
            replica.name = replica.url = ""


async def _awaited(reference: Any) -> Any:
    return await reference


def _end(end: asyncio.Future[End]) -> End:
    """As the host said; or else the line of Ray's long answer that says it."""
    error = end.exception()
    if error is None:
        return end.result()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line or "exit" in line]
    return End(1, (telling or lines or ["it ended"])[0])
