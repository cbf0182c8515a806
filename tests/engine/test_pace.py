"""When the engine works and when it waits: idle, beside slow readers, with an instant device."""

import asyncio
from dataclasses import replace

import pytest

from fastserve_jax.engine import Engine
from fastserve_jax.errors import EngineFailed
from tests.engine.house import LIMITS, House
from tests.fakes import alone


async def test_an_idle_engine_does_nothing_and_wakes_at_once(monkeypatch):
    async with House() as house:
        turns = 0
        plan = house.scheduler.plan

        def counted(now):
            nonlocal turns
            turns += 1
            return plan(now)

        monkeypatch.setattr(house.scheduler, "plan", counted)
        await asyncio.sleep(0.05)
        assert turns <= 1  # as it starts
        await house.ask(house.request())
        after = turns
        await asyncio.sleep(0.05)
        assert turns <= after + 2
    assert after < 20


async def test_a_reader_that_never_reads_holds_nobody_up():
    async with House() as house:
        async with house.engine.stream(house.request(max_tokens=40)) as unread:
            other = house.request((5,), 40)
            assert await house.ask(other) == alone(other)
            await house.assert_empty()
            kept = [event async for event in unread]
        assert len(kept) == 42


class Instant:
    """Has the result before it is asked for it."""

    def __init__(self, device):
        self.device = device

    def dispatch(self, plan):
        future = asyncio.get_running_loop().create_future()
        future.set_result(self.device.run(plan))
        return future


class Coroutines(Instant):
    async def dispatch(self, plan):
        return self.device.run(plan)


@pytest.mark.parametrize("runner", [Instant, Coroutines])
async def test_a_runner_that_answers_at_once_lets_others_run(runner):
    house = House()
    house.engine = Engine(house.scheduler, runner(house.device))
    ticks = 0

    async def ticker():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async with house:
        other = asyncio.create_task(ticker())
        request = house.request(max_tokens=40)
        assert await house.ask(request) == alone(request)
        other.cancel()
    assert ticks > 40


async def test_steps_are_recorded():
    async with House() as house:
        await house.ask(house.request(range(30), 3))
        records = house.records
    assert [record.step for record in records] == list(range(len(records)))
    assert [(r.rows, r.tokens, r.prefill_tokens) for r in records] == [
        (1, 24, 24),
        (1, 6, 6),
        (1, 1, 0),
        (1, 1, 0),
    ]
    assert all(record.elapsed_s >= 0 for record in records)
    assert records[-1].stats.output_tokens == 3


async def test_an_engine_that_was_not_started_refuses():
    house = House()
    with pytest.raises(EngineFailed, match="not running"):
        await house.ask(house.request())


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("delay_s", [0.0, 0.0005])
async def test_while_tokens_are_waited_for_nothing_is_asked_again_and_again(overlap, delay_s):
    house = House(replace(LIMITS, guesses=7), overlap=overlap, delay_s=delay_s, vocab=2)
    asked, plan = 0, house.scheduler.plan

    def counted(now):
        nonlocal asked
        asked += 1
        return plan(now)

    house.scheduler.plan = counted
    async with house:
        requests = [house.request([0, 1] * 8, 30, seed=seed) for seed in range(3)]
        for got, request in zip(
            await asyncio.gather(*map(house.ask, requests)), requests, strict=True
        ):
            assert got == alone(request, 2)
        await house.assert_empty()
        stats = house.engine.stats()
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
    assert asked <= 2 * stats.steps + 4
