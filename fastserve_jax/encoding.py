"""The loop of an encoder: texts of all requests in turn, as many at once as a step takes.

First come, first served, for each costs one step and no more. Knows no device, no HTTP and no
words: a text is its tokens. Imports no jax.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from fastserve_jax.errors import EngineFailed, Overloaded

type Numbers = Sequence[float]


@dataclass(frozen=True, slots=True)
class Text:
    tokens: Sequence[int]
    segments: Sequence[int]  # of each token which text it is of, where there are two


type Run = Callable[[Sequence[Text]], Sequence[Numbers]]


class Encodings:
    """Use as `async with`. `run` takes a step on its own thread, of at most `max_texts` texts and,
    padded to the longest, `step_tokens` tokens, unless it is one text alone."""

    def __init__(self, run: Run, *, max_texts: int, step_tokens: int, max_queue: int) -> None:
        self._run = run
        self._max_texts, self._step_tokens, self._max_queue = max_texts, step_tokens, max_queue
        self._waiting: deque[tuple[Text, asyncio.Future[Numbers]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.failure: BaseException | None = None
        self.steps = self.texts = self.tokens = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.create_task(self._steps(), name="encoder")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.cancel()
        await asyncio.wait({self._loop})
        self._end(EngineFailed("the server stops"))
        await asyncio.to_thread(self._thread.shutdown)  # others are served meanwhile
        del self._run  # and with it the weights: its numbers are asked for on

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def numbers(self, texts: Sequence[Text]) -> list[Numbers]:
        """Of each text, in their order. Raises Overloaded, and has then queued none of them;
        EngineFailed where a step failed. A caller that is cancelled leaves the queue."""
        if self.failure is not None:
            raise EngineFailed("the encoder has stopped; the server must be restarted")
        if len(self._waiting) + len(texts) > self._max_queue:
            raise Overloaded(
                f"{len(self._waiting)} texts are waiting, and {len(texts)} more would be above "
                f"{self._max_queue}: try again later, or send fewer at once"
            )
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Numbers]] = [loop.create_future() for _ in texts]
        self._waiting.extend(zip(texts, futures, strict=True))
        self._arrived.set()
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    def _next(self) -> list[tuple[Text, asyncio.Future[Numbers]]]:
        """From the front of the queue; those whose callers have gone are passed over."""
        step: list[tuple[Text, asyncio.Future[Numbers]]] = []
        longest = 0
        while self._waiting and len(step) < self._max_texts:
            text, future = self._waiting[0]
            if not future.done():
                longest = max(longest, len(text.tokens))
                if step and longest * (len(step) + 1) > self._step_tokens:
                    break
                step.append((text, future))
            self._waiting.popleft()
        return step

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            step = self._next()
            if not step:
                self._arrived.clear()
                continue
            texts = [text for text, _ in step]
            try:
                made = await loop.run_in_executor(self._thread, self._run, texts)
            except Exception as error:
                self.failure = error
                for _, future in step:
                    if not future.done():
                        future.set_exception(EngineFailed(f"a step failed: {error}"))
                self._end(EngineFailed("the encoder has stopped"))
                return
            self.steps += 1
            self.texts += len(texts)
            self.tokens += sum(len(text.tokens) for text in texts)
            for (_, future), numbers in zip(step, made, strict=True):
                if not future.done():
                    future.set_result(numbers)

    def _end(self, error: EngineFailed) -> None:
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)
