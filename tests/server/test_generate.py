from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from fastserve_jax.core.types import DoneEvent, Finish, Request, Sampling, TokenEvent
from fastserve_jax.errors import EngineFailed, Overloaded
from fastserve_jax.server.generate import generate


class ScriptedEngine:
    """Each request yields `tokens` and ends; ids in `refused` are not taken, in `failing` fail."""

    failure = None

    def __init__(self, tokens: int = 3, refused: frozenset = frozenset(), failing=frozenset()):
        self._tokens = tokens
        self._refused = refused
        self._failing = failing
        self.open: set[int] = set()

    def new_id(self) -> int:
        return 0

    def time(self) -> float:
        return 0.0

    @asynccontextmanager
    async def stream(self, request: Request):
        await asyncio.sleep(0)
        if request.id in self._refused:
            raise Overloaded("full")
        self.open.add(request.id)
        try:
            yield self._events(request.id)
        finally:
            self.open.remove(request.id)

    async def _events(self, request_id: int):
        for token in range(self._tokens):
            await asyncio.sleep(0)
            if request_id in self._failing:
                raise EngineFailed("broken")
            yield TokenEvent(request_id, token)
        yield DoneEvent(request_id, Finish.LENGTH, self._tokens)


def requests(count: int) -> list[Request]:
    return [Request(i, (1,), Sampling(max_tokens=3)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 50])
async def test_every_event_of_every_request_once_and_in_order(count):
    engine = ScriptedEngine(tokens=20)
    seen: dict[int, list] = {i: [] for i in range(count)}
    async with generate(engine, requests(count)) as events:
        async for batch in events:
            for index, event in batch:
                seen[index].append(event)
    for index, events_of in seen.items():
        assert [event.token for event in events_of[:-1]] == list(range(20))
        assert events_of[-1].request_id == index
    assert not engine.open


@pytest.mark.parametrize("count", [1, 3])
async def test_one_refusal_refuses_all_and_leaves_nothing(count):
    engine = ScriptedEngine(refused=frozenset({count - 1}))
    with pytest.raises(Overloaded):
        async with generate(engine, requests(count)):
            pytest.fail("was let in")
    assert not engine.open


@pytest.mark.parametrize("count", [1, 3])
async def test_a_failure_while_reading_reaches_the_reader(count):
    engine = ScriptedEngine(failing=frozenset({count - 1}))

    async def read() -> None:
        async with generate(engine, requests(count)) as events:
            async for _ in events:
                pass

    with pytest.raises(EngineFailed):
        await read()
    assert not engine.open


async def test_stopping_one_frees_it_while_the_others_go_on():
    engine = ScriptedEngine(tokens=1000)
    counts = [0, 0, 0]
    async with generate(engine, requests(3)) as events:
        async for batch in events:
            for index, _ in batch:
                counts[index] += 1
            if counts[1] >= 5 and 1 in engine.open:
                events.stop(1)
        assert not engine.open
    assert counts[0] == counts[2] == 1001
    assert counts[1] < 1000


async def test_stopping_all_ends_the_reading():
    engine = ScriptedEngine(tokens=1000)
    for count in (1, 4):
        async with generate(engine, requests(count)) as events:
            async for _ in events:
                for index in range(count):
                    events.stop(index)
        assert not engine.open


@pytest.mark.parametrize("count", [1, 3])
async def test_cancelling_the_reader_frees_all(count):
    engine = ScriptedEngine(tokens=10**6)

    async def read() -> None:
        async with generate(engine, requests(count)) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(read())
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(engine.open) == count
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert not engine.open


async def test_a_reader_that_does_not_read_holds_back_the_rest():
    engine = ScriptedEngine(tokens=10**6)
    async with generate(engine, requests(4)) as events:
        for _ in range(2000):
            await asyncio.sleep(0)
        async for batch in events:
            assert len(batch) <= 256 + 4
            break
