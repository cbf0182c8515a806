"""Several engine requests as one stream of events. Leaving it, by any way, frees them all.

Knows the engine's contract; knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from fastserve_jax.core.types import Event, Request, StartEvent
from fastserve_jax.server.served import Generator

QUEUED_EVENTS = 256  # of all choices of one answer, before the engine's own queues fill

Batch = list[tuple[int, Event]]  # (index of the request, its event)


class Events(Protocol):
    """Batches of what is already there. `stop` ends one request early."""

    def __aiter__(self) -> AsyncIterator[Batch]: ...
    def stop(self, index: int) -> None: ...


class _One:
    def __init__(self, events: AsyncIterator[Event]) -> None:
        self._events = events
        self._stopped = False

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        if self._stopped:
            raise StopAsyncIteration
        batch: Batch = []
        while _says_nothing(batch):
            batch.append((0, await anext(self._events)))
        return batch

    def stop(self, index: int) -> None:
        self._stopped = True


class _Many:
    """A task per request, so that each enters and leaves the engine by itself."""

    def __init__(self, engine: Generator, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(
            QUEUED_EVENTS
        )
        self._answered = asyncio.Semaphore(0)
        self._refusal: Exception | None = None
        self._open = len(requests)
        self._tasks = [
            asyncio.create_task(self._pump(engine, i, request))
            for i, request in enumerate(requests)
        ]

    async def _pump(self, engine: Generator, index: int, request: Request) -> None:
        admitted = False
        last: Exception | None = None
        try:
            async with engine.stream(request) as events:
                admitted = True
                self._answered.release()
                async for event in events:
                    await self._queue.put((index, event))
        except Exception as error:
            last = error
        if not admitted:
            self._refusal = last
            self._answered.release()
        else:
            await self._queue.put((index, last))

    async def admitted(self) -> None:
        """All are in the engine; raises what it raised if it refused one."""
        for _ in self._tasks:
            await self._answered.acquire()
        if self._refusal is not None:
            raise self._refusal

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        batch: Batch = []
        while _says_nothing(batch):
            if not self._open and self._queue.empty():
                raise StopAsyncIteration
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            for index, item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    self._open -= 1
                else:
                    batch.append((index, item))
        return batch

    def stop(self, index: int) -> None:
        task = self._tasks[index]
        if not task.done():
            task.cancel()
            self._open -= 1


def _says_nothing(batch: Batch) -> bool:
    """A start alone is no answer yet: the first token may still fail with a status of its own."""
    return all(type(event) is StartEvent for _, event in batch)


@asynccontextmanager
async def generate(engine: Generator, requests: Sequence[Request]) -> AsyncIterator[Events]:
    """Submits all requests, or none: raises InvalidRequest, Overloaded or EngineFailed."""
    if len(requests) == 1:
        async with engine.stream(requests[0]) as events:
            yield _One(events)
        return
    many = _Many(engine, requests)
    try:
        await many.admitted()
        yield many
    finally:
        await many.close()
