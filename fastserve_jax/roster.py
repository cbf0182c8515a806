"""Which models are served: a new one is loaded beside those that are, and takes its name when it is
warm; one that has lost its name finishes what it has, and goes. Knows names, not how one is loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from fastserve_jax.errors import OperatorError
from fastserve_jax.server.served import Entry
from fastserve_jax.server.state import ServerState
from fastserve_jax.terminal import console
from fastserve_jax.weights.registry import REGISTRY, Registry

LOOK_S = 1.0  # between two looks at what a registered name means

_log = logging.getLogger(__name__)

type Host = Callable[[str, str | None], AbstractAsyncContextManager[Entry]]


@dataclass(slots=True)
class _Kept:
    reference: str
    served: Entry
    retired: asyncio.Event


@dataclass(slots=True)
class Roster:
    """`host` of a reference, and of a name or None, is a model while it is entered."""

    state: ServerState
    host: Host
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False)  # by name
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _one: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    @property
    def loading(self) -> bool:
        return self._one.locked()

    async def load(self, reference: str, name: str | None = None) -> Entry:
        """Return when it is served. One at a time: each takes of the memory that is free then.
        Raises OperatorErrors, and has changed nothing. Whoever is cancelled is not told."""
        return await asyncio.shield(asyncio.ensure_future(self._load(reference, name)))

    async def _load(self, reference: str, name: str | None) -> Entry:
        async with self._one:
            opened: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
            keeping = asyncio.create_task(self._keep(reference, name, opened), name="model")
            self._tasks.add(keeping)
            keeping.add_done_callback(self._tasks.discard)
            both: set[asyncio.Future[Entry] | asyncio.Task[None]] = {opened, keeping}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done():
                keeping.result()  # raises why
            return opened.result()

    async def _keep(self, reference: str, name: str | None, opened: asyncio.Future[Entry]) -> None:
        async with self.host(reference, name) as served:
            retired = asyncio.Event()
            self._put(_Kept(reference, served, retired))
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
        registry, failed = Registry(cache_dir / REGISTRY), set[str]()
        while True:
            await asyncio.sleep(LOOK_S)
            for name, kept in list(self._kept.items()):
                number = await asyncio.to_thread(registry.current, kept.reference)
                wanted = f"{kept.reference}@{number}"
                if number is None or wanted in (kept.served.root, *failed):
                    continue
                console.print(f"{kept.reference} is {wanted} now: loading it beside")
                try:
                    await self._follow(kept.reference, wanted, name)
                except OperatorError as error:
                    failed.add(wanted)
                    console.print(f"{wanted} cannot be served: {error}", style="bold red")
                except Exception:
                    failed.add(wanted)
                    _log.exception("%s cannot be served", wanted)

    async def _follow(self, reference: str, wanted: str, name: str) -> None:
        await self.load(wanted, name)
        self._kept[name].reference = reference  # goes on following
        console.print(f"{name} is served by {wanted}")
