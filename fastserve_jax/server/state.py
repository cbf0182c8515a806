"""What every handler shares: the models by name, the phase, and the work in flight. Knows no
route, and not how a model comes to be served.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from fastserve_jax.errors import EngineFailed, InvalidRequest, ModelNotFound, Overloaded
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.served import Entry, Served, ServedEncoder
from fastserve_jax.server.slow_readers import SlowReaders
from fastserve_jax.server.store import ResponseStore


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Roster(Protocol):
    """Brings models in and lets them go while others are served."""

    async def load(self, reference: str, name: str | None) -> Entry: ...
    async def unload(self, name: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Work:
    """Something accepted, and the model that it asks, once that is known."""

    served: Entry | None = None


_WORK: ContextVar[_Work | None] = ContextVar("work", default=None)  # that this task is at


class ServerState:
    """Owned by one application; every method runs on its loop."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.phase = Phase.LOADING
        self.roster: Roster | None = None  # None: what is served stays
        self.slow_readers = SlowReaders(config.send_timeout_s)
        metrics.observe(lambda: {"slow_readers_dropped_total": self.slow_readers.dropped})
        self.responses = ResponseStore(
            config.stored_responses, config.stored_bytes, config.stored_ttl_s
        )
        self.draining = asyncio.Event()
        self._models: dict[str, Entry] = {}  # the first is meant where none is named
        self._works: set[_Work] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = asyncio.Event()  # some work has

    # Models

    def put(self, served: Entry) -> None:
        """From now on it has the requests that say its name."""
        self._models[served.name] = served

    def drop(self, served: Entry) -> None:
        """It has no new requests, with adapters or without. Nothing where another has taken its
        place."""
        if self._models.get(served.name) is served:
            del self._models[served.name]

    async def left(self, served: Entry) -> None:
        """Return when no request is at it; there will be no new ones once it was dropped."""
        while any(work.served and work.served.engine is served.engine for work in self._works):
            self._ended.clear()
            await self._ended.wait()

    @property
    def models(self) -> list[Entry]:
        """Raises Overloaded while loading or draining, EngineFailed when failed."""
        if self.failed:
            raise EngineFailed("the engine has stopped; the server must be restarted")
        if self.phase is Phase.DRAINING:
            raise Overloaded("the server is shutting down", retry_after_s=5)
        if self.phase is Phase.LOADING:
            raise Overloaded("the model is still loading", retry_after_s=5)
        return self.entries

    @property
    def entries(self) -> list[Entry]:
        """All of them, whatever the phase; behind them those with adapters."""
        models = list(self._models.values())
        return models + [
            adapted for own in models if isinstance(own, Served) for adapted in own.beside()
        ]

    @property
    def failed(self) -> bool:
        """An engine is gone for good."""
        return any(served.engine.failure is not None for served in self._models.values())

    def model(self, name: str | None) -> Served:
        """Raises what `named` does, and InvalidRequest of an encoder."""
        served = self.named(name)
        if isinstance(served, ServedEncoder):
            says = "says labels" if served.labels else "is an encoder"
            routes = "/classify" if served.labels else "/v1/embeddings or /score"
            raise InvalidRequest(
                f"{served.name} {says} and writes nothing: ask {routes}", param="model"
            )
        return served

    def encoder(self, name: str | None) -> ServedEncoder:
        served = self.named(name)
        if isinstance(served, Served):
            raise InvalidRequest(
                f"{served.name} is no encoder: ask /v1/chat/completions or /v1/completions",
                param="model",
            )
        return served

    def named(self, name: str | None) -> Entry:
        """The work that this task is at counts as the model's. Raises what `models` does, and
        ModelNotFound."""
        models = self.models
        found = models[:1] if name is None else [own for own in models if own.name == name]
        if not models:
            raise ModelNotFound("no model is served here: load one with POST /models/load")
        if not found:
            there = ", ".join(repr(own.name) for own in models)
            fault = f"model {name!r:.102} is not served here; ask for {there}"
            raise ModelNotFound(fault, param="model")
        if (work := _WORK.get()) is not None:
            work.served = found[0]
        return found[0]

    # Phases and work

    def ready(self) -> None:
        """What is to be served from the start is loaded and warm: work is taken from now on."""
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        """Take no new work; what was accepted goes on."""
        self.phase = Phase.DRAINING
        self.draining.set()

    async def idle(self) -> None:
        await self._idle.wait()

    @property
    def in_flight(self) -> int:
        return len(self._works)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Counts as accepted work, of this task: a drain waits for it, and so does whoever lets the
        model go that it asks."""
        work = _Work()
        self._works.add(work)
        self._idle.clear()
        outer = _WORK.set(work)
        try:
            yield
        finally:
            _WORK.reset(outer)
            work.served = None  # timers may remember the work, and with it a model, for long
            self._works.discard(work)
            self._ended.set()
            if not self._works:
                self._idle.set()
