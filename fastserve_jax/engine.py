"""The loop: one task that asks the scheduler for plans and the runner to carry them out.

Imports core and errors only; it never sees jax. The scheduler is touched on the event loop alone,
so there is no lock anywhere, and nothing polls.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from .core.cost import StepLoad
from .core.replicas import Replicas
from .core.scheduler import Scheduler
from .core.stats import Stats
from .core.types import Adapter, Ask, DoneEvent, Event, Plan, Proposed, Request, StepResult
from .errors import EngineFailed, ModelNotFound

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """What carries out plans. They are dispatched, and must take effect, in order."""

    def dispatch(self, plan: Plan) -> Awaitable[StepResult]:
        """Start `plan` and return at once; awaiting gives what came of it."""

    def propose(self, ask: Ask) -> Awaitable[Proposed]:
        """The same of what a draft model is asked; only where limits say that there is one."""

    def adapt(self, index: int, adapter: Any, /) -> None:
        """Put an adapter's arrays at `index` for all plans to come."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One committed step."""

    step: int
    rows: int  # sequences in it
    tokens: int  # positions run
    prefill_tokens: int  # of them, in chunks of more than one
    load: StepLoad
    elapsed_s: float  # from its dispatch or the end of the step before, whichever was later
    stats: Stats


class _Stream:
    """Events of one request on the way to its one reader; bounded by the request's length."""

    __slots__ = ("_events", "_failure", "_over", "_waiter", "adapter")

    def __init__(self, adapter: Adapter | None) -> None:
        self.adapter = adapter
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: EngineFailed | None = None
        self._over = False

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, failure: EngineFailed) -> None:
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            assert self._waiter is None, "a stream has one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._events.popleft()
        if type(event) is DoneEvent:
            self._over = True
        return event


@dataclass(slots=True)
class _Step:
    plan: Plan
    result: asyncio.Future[StepResult]
    began: float


class Engine:
    """Use as `async with`; inside, `stream` requests. Leaving waits for the step in flight, and
    fails the streams still open."""

    def __init__(
        self,
        scheduler: Scheduler | Replicas,
        runner: Runner,
        *,
        overlap: bool = True,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._most_in_flight = 2 if overlap else 1
        self._on_step = on_step
        self._streams: dict[int, _Stream] = {}
        self._adapters: dict[int, Adapter] = {}  # by index
        self._ids = itertools.count(1)
        self._steps: deque[_Step] = deque()
        self._asked: asyncio.Future[Proposed] | None = None
        self._last_step_ended = 0.0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        assert self._task is None, "an engine runs once"
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name="engine")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._closing = True
        self._wake.set()
        await _outlast([self._task])

    @property
    def running(self) -> bool:
        return self._task is not None and not self._closing and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine, if it did not stop by itself."""
        return self._failure

    def time(self) -> float:
        """The clock on which deadlines are read."""
        return asyncio.get_running_loop().time()

    def stats(self) -> Stats:
        return self._scheduler.stats()

    def new_id(self) -> int:
        return next(self._ids)

    @asynccontextmanager
    async def stream(self, request: Request) -> AsyncIterator[AsyncIterator[Event]]:
        """Submit `request` and read its events, DoneEvent last.

        Raises InvalidRequest (ModelNotFound of an adapter that is gone), Overloaded or EngineFailed
        at entry, EngineFailed while reading.
        Leaving the block, by any way, ends the request and gives slot and pages back.
        """
        if not self.running:
            raise self._failed()
        adapter = request.adapter
        if adapter is not None and self._adapters.get(adapter.index) != adapter:
            raise ModelNotFound("the adapter was unloaded meanwhile", param="model")
        self._scheduler.submit(request, self.time())
        stream = self._streams[request.id] = _Stream(adapter)
        self._idle.clear()
        self._wake.set()
        try:
            yield stream
        finally:
            del self._streams[request.id]
            self._scheduler.cancel(request.id)
            self._wake.set()

    @property
    def adapters_in_use(self) -> set[int]:
        """Indices of those that are loaded, and of those that a request still goes on with."""
        used = (stream.adapter for stream in self._streams.values())
        return {*self._adapters, *(adapter.index for adapter in used if adapter is not None)}

    def add_adapter(self, adapter: Adapter, arrays: Any) -> None:
        """Put it where nobody uses one; requests may name it from now on."""
        assert adapter.index not in self.adapters_in_use, f"{adapter} would take another's place"
        self._runner.adapt(adapter.index, arrays)
        self._adapters[adapter.index] = adapter

    def drop_adapter(self, adapter: Adapter) -> None:
        """Requests that have it go on with it; new ones are refused."""
        del self._adapters[adapter.index]

    def abandon(self, why: str) -> None:
        """Fail every stream at once: the step in flight may never end."""
        if self._failure is None:
            self._failure = EngineFailed(why)
        self._closing = True
        for stream in self._streams.values():
            stream.fail(self._failed())
        self._idle.set()

    async def ended(self) -> None:
        """Return when the engine has stopped, for whatever reason."""
        assert self._task is not None, "enter the engine first"
        await asyncio.wait({self._task})

    async def drain(self) -> None:
        """Return when no request is live, or the engine has stopped."""
        await self._idle.wait()

    # The loop

    async def _run(self) -> None:
        try:
            while not self._closing:
                await self._turn()
            while self._steps:
                await self._finish_step()
        except BaseException as error:
            self._failure = error
            if not isinstance(error, Exception):
                raise  # cancelled, or the process is being stopped
            _log.exception("the engine stopped")
        finally:
            for stream in self._streams.values():
                stream.fail(self._failed())
            self._idle.set()
            await _outlast(step.result for step in self._steps)
            await _outlast([self._asked] if self._asked is not None else [])

    async def _turn(self) -> None:
        """Start one step if there is one, and finish one if there are enough."""
        self._wake.clear()
        ask = self._scheduler.ask()
        if ask is not None:
            await self._hear(ask)
        now = self.time()
        self._deliver(self._scheduler.expire(now))
        plan = self._scheduler.plan(now)
        if plan is not None:
            self._steps.append(_Step(plan, asyncio.ensure_future(self._runner.dispatch(plan)), now))
        if plan is None and not self._steps:
            await self._sleep()
        elif plan is None or len(self._steps) == self._most_in_flight:
            await self._finish_step()

    async def _hear(self, ask: Ask) -> None:
        """What a draft model says, before the step that it is for is planned."""
        began = self.time()
        self._asked = asyncio.ensure_future(self._runner.propose(ask))
        await asyncio.wait({self._asked})  # unlike a plain await, never cancels it
        proposed, self._asked = self._asked.result(), None
        self._scheduler.hear(ask, proposed, self.time() - began)

    async def _finish_step(self) -> None:
        step = self._steps[0]
        if step.result.done():
            await asyncio.sleep(0)  # a runner that is never late must not shut others out
        else:
            await asyncio.wait({step.result})  # unlike a plain await, never cancels the step
        self._steps.popleft()
        result = step.result.result()
        now = self.time()
        elapsed_s = now - max(step.began, self._last_step_ended)
        self._last_step_ended = now
        self._deliver(self._scheduler.commit(step.plan, result, elapsed_s, now))
        if self._on_step is not None:
            self._on_step(self._record(step.plan, elapsed_s))

    async def _sleep(self) -> None:
        """Until a request comes, goes, or reaches its deadline."""
        if not self._scheduler.live:
            self._idle.set()
        deadline = self._scheduler.next_deadline()
        if deadline is None:
            await self._wake.wait()
            return
        timer = asyncio.get_running_loop().call_at(deadline, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _deliver(self, events: Iterable[Event]) -> None:
        streams = self._streams
        for event in events:
            stream = streams.get(event.request_id)
            if stream is not None:
                stream.put(event)

    def _record(self, plan: Plan, elapsed_s: float) -> StepRecord:
        load = plan.load
        of_each = [own.load for own in plan.replicas or (plan,)]
        tokens = sum(own.tokens for own in of_each)
        prefill_tokens = sum(own.prefill_tokens for own in of_each)
        return StepRecord(
            *(plan.step, len(plan.work), tokens, prefill_tokens),
            *(load, elapsed_s, self._scheduler.stats()),
        )

    def _failed(self) -> EngineFailed:
        if self._failure is None:
            return EngineFailed("the engine is not running")
        if isinstance(self._failure, EngineFailed):
            return self._failure
        failed = EngineFailed("the engine stopped: start the server again, its log says why")
        failed.__cause__ = self._failure
        return failed


async def _outlast[T](futures: Iterable[asyncio.Future[T]]) -> None:
    """Wait until all `futures` are done, whatever they come to, even while being cancelled."""
    cancelled: asyncio.CancelledError | None = None
    waited = list(futures)
    while pending := [future for future in waited if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    for future in waited:
        if not future.cancelled():
            future.exception()  # seen: it reaches the streams, not the loop's handler
    if cancelled is not None:
        raise cancelled
