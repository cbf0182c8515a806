"""Which models are served: a new one is loaded beside those that are, and takes its name when it is
warm; one that has lost its name finishes what it has, and goes. Knows names, not how one is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastserve_jax.errors import FastServeError
from fastserve_jax.server.served import Entry
from fastserve_jax.server.state import ServerState
from fastserve_jax.terminal import console
from fastserve_jax.weights.registry import REGISTRY, Registry

LOOK_S = 1.0  # between two looks at what a registered name means
AGAIN_S = 60.0  # before what could not be served is tried again: there may be room by then

_log = logging.getLogger(__name__)


class Hosting(Protocol):
    def host(self, reference: str, name: str | None) -> AbstractAsyncContextManager[Entry]:
        """That is a model while it is entered."""

    def forget(self, name: str) -> None:
        """What whoever takes the name would have taken over."""


@dataclass(slots=True)
class _Kept:
    reference: str
    served: Entry
    retired: asyncio.Event


@dataclass(slots=True)
class Roster:
    state: ServerState
    hosting: Hosting
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False)  # by name
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, init=False)
    _one: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def load(self, reference: str, name: str | None = None) -> Entry:
        """Return when it is served. One at a time: each takes of the memory that is free then.
        Raises OperatorErrors, and has changed nothing. Whoever is cancelled is not told."""
        served = await asyncio.shield(self._begin(self._load(reference, name)))
        assert served is not None
        return served

    async def _load(
        self, reference: str, name: str | None, instead: _Kept | None = None
    ) -> Entry | None:
        """None where it was to follow `instead`, and a person has decided otherwise meanwhile."""
        async with self._one:
            if self._is_gone(instead):
                return None
            opened: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
            keeping = self._begin(self._keep(reference, name, instead, opened))
            both: set[asyncio.Future[Entry] | asyncio.Task[None]] = {opened, keeping}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if opened.done():
                return opened.result()
            keeping.result()  # raises why
            return None

    def _begin[T](self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _is_gone(self, kept: _Kept | None) -> bool:
        return kept is not None and self._kept.get(kept.served.name) is not kept

    async def _keep(
        self,
        reference: str,
        name: str | None,
        instead: _Kept | None,
        opened: asyncio.Future[Entry],
    ) -> None:
        async with self.hosting.host(reference, name) as served:
            if self._is_gone(instead):
                return
            retired = asyncio.Event()
            self._put(_Kept(instead.reference if instead else reference, served, retired))
            del instead  # whose weights nobody may hold
            opened.set_result(served)
            del opened
            await retired.wait()
            self.state.drop(served)
            await self.state.left(served)
            said = served.root or served.name
        console.print(f"{said} has finished what it had, and is gone")

    def _put(self, kept: _Kept) -> None:
        before = self._kept.get(kept.served.name)
        self._kept[kept.served.name] = kept
        self.state.put(kept.served)
        if before is not None:
            before.retired.set()

    async def unload(self, name: str) -> None:
        """No new requests are its; those that it has are finished first."""
        kept = self._kept.pop(name)
        self.hosting.forget(name)
        self.state.drop(kept.served)
        kept.retired.set()

    async def close(self) -> None:
        """All of them, whatever they are at."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self, cache_dir: Path) -> None:
        """For ever: what was asked for by a registered name is what the name means now."""
        registry = Registry(cache_dir / REGISTRY)
        failed: dict[str, tuple[str, float]] = {}  # by name: which version, and when
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look(registry, failed)

    async def _look(self, registry: Registry, failed: dict[str, tuple[str, float]]) -> None:
        """Once at each name. By itself, for nothing may hold a model until the next look."""
        for name, kept in list(self._kept.items()):
            number = await asyncio.to_thread(registry.current, kept.reference)
            wanted = f"{kept.reference}@{number}"
            if number is None or wanted == kept.served.root:
                failed.pop(name, None)
                continue
            version, at_s = failed.get(name, ("", 0.0))
            if wanted == version and time.monotonic() < at_s + AGAIN_S:
                continue
            if not await self._follow(wanted, kept):
                failed[name] = wanted, time.monotonic()

    async def _follow(self, wanted: str, kept: _Kept) -> bool:
        """False where it cannot be served; has said why."""
        console.print(f"{kept.reference} is {wanted} now: loading it beside")
        try:
            served = await self._load(wanted, kept.served.name, kept)
        except FastServeError as error:
            console.print(f"{wanted} cannot be served: {error}", style="bold red")
            return False
        except Exception:
            _log.exception("%s cannot be served", wanted)
            return False
        if served is not None:
            console.print(f"{served.name} is served by {wanted}")
        return True
