"""The engine in real asyncio, on the checking device: streams, endings, failures, nothing left."""

import asyncio
import random
from contextlib import AsyncExitStack

import pytest

from fastserve_jax.core.scheduler import Limits
from fastserve_jax.core.types import (
    DoneEvent,
    Finish,
    PromptEvent,
    StartEvent,
    TokenEvent,
)
from fastserve_jax.errors import EngineFailed, InvalidRequest, Overloaded
from tests.engine.house import House
from tests.fakes import VOCAB, alone


async def test_a_stream_gives_prompt_scores_tokens_and_the_end():
    async with House() as house:
        request = house.request(prompt_logprobs=0, logprobs=2)
        async with house.engine.stream(request) as events:
            received = [event async for event in events]
        kinds = [StartEvent, PromptEvent, *[TokenEvent] * 4, DoneEvent]
        assert [type(event) for event in received] == kinds
        assert [event.token for event in received[2:-1]] == alone(request)[0]
        assert len(received[2].top) == 2
        await house.assert_empty()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
async def test_a_hundred_clients_some_leaving_early(policy, overlap):
    rng = random.Random(5)

    async def client(house, request, leaves_after):
        async with house.engine.stream(request) as events:
            tokens = []
            async for event in events:
                if isinstance(event, TokenEvent):
                    tokens.append(event.token)
                if leaves_after is not None and len(tokens) == leaves_after:
                    return
        assert tokens == alone(request)[0]

    async with House(policy=policy, overlap=overlap) as house:
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
                stops = frozenset(rng.sample(range(VOCAB), 2))
                request = house.request(prompt, rng.randint(1, 30), stop_ids=stops)
                leaves_after = rng.choice([None, None, 0, 3])
                group.create_task(client(house, request, leaves_after))
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
        await house.assert_empty()
        assert house.runner.most_in_flight == (2 if overlap else 1)
        assert house.scheduler.stats().preemptions > 0


async def test_entry_raises_what_the_scheduler_refuses():
    limits = Limits(page_size=4, num_pages=48, max_slots=1, step_tokens=8, max_queue=1)
    async with House(limits, delay_s=0.01) as house:
        with pytest.raises(InvalidRequest):
            async with house.engine.stream(house.request(prompt=())):
                pytest.fail("entered")
        async with house.engine.stream(house.request(max_tokens=30)) as events:
            await anext(events)
            async with house.engine.stream(house.request()):
                with pytest.raises(Overloaded):
                    async with house.engine.stream(house.request()):
                        pytest.fail("entered")
        await house.assert_empty()


@pytest.mark.parametrize("fail_at", [0, 1, 4])
async def test_a_runner_failure_reaches_everybody(fail_at, caplog):
    async with House(fail_at=fail_at, delay_s=0.001) as house:
        outcomes = await asyncio.gather(
            *(house.ask(house.request((i,), 30)) for i in range(12)), return_exceptions=True
        )
        assert all(isinstance(outcome, EngineFailed) for outcome in outcomes)
        assert {str(outcome.__cause__) for outcome in outcomes} == {"the device is on fire"}
        assert str(house.engine.failure) == "the device is on fire"
        assert not house.engine.running
        with pytest.raises(EngineFailed) as refusal:
            await house.ask(house.request())
        assert refusal.value.__cause__ is house.engine.failure
        await asyncio.wait_for(house.engine.drain(), 5)
    assert "the device is on fire" in caplog.text


async def test_tokens_before_a_failure_are_delivered_first():
    async with House(fail_at=3, overlap=False) as house:
        request, tokens = house.request(max_tokens=9), []

        async def read():
            async with house.engine.stream(request) as events:
                async for event in events:
                    tokens.extend([event.token] if isinstance(event, TokenEvent) else [])

        with pytest.raises(EngineFailed):
            await read()
        async with AsyncExitStack() as stack:
            with pytest.raises(EngineFailed):
                await stack.enter_async_context(house.engine.stream(house.request()))
    assert tokens == alone(request)[0][:3]


async def test_our_own_bug_reaches_everybody_too(monkeypatch):
    def commit(*_):
        raise AssertionError("the books do not balance")

    async with House() as house:
        monkeypatch.setattr(house.scheduler, "commit", commit)
        with pytest.raises(EngineFailed) as failed:
            await house.ask(house.request())
        assert str(failed.value.__cause__) == "the books do not balance"


async def test_a_dispatch_that_raises_is_a_failure(monkeypatch):
    async with House() as house:
        monkeypatch.setattr(house.runner, "dispatch", lambda plan: 1 / 0)
        with pytest.raises(EngineFailed) as failed:
            await house.ask(house.request())
        assert isinstance(failed.value.__cause__, ZeroDivisionError)


async def test_cancelling_a_client_gives_everything_back():
    async with House(delay_s=0.005) as house:
        clients = [asyncio.create_task(house.ask(house.request((i,), 40))) for i in range(20)]
        await asyncio.sleep(0.02)
        for client in clients:
            client.cancel()
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await house.assert_empty()


async def test_cancelling_a_client_in_the_middle_of_a_wait_leaves_others_alone():
    async with House(delay_s=0.002) as house:
        stays, goes = house.request(max_tokens=20), house.request((9,), 20)
        staying = asyncio.create_task(house.ask(stays))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(house.ask(goes), 0.01)
        assert await staying == alone(stays)
        await house.assert_empty()


async def test_leaving_the_engine_ends_open_streams_and_waits_for_the_step_in_flight():
    house = House(delay_s=0.02)
    async with house:
        client = asyncio.create_task(house.ask(house.request(max_tokens=50)))
        await asyncio.sleep(0.03)
        assert house.runner.in_flight
    assert house.runner.in_flight == 0
    with pytest.raises(EngineFailed, match="not running"):
        await client
    with pytest.raises(EngineFailed):
        await house.ask(house.request())
    assert house.scheduler.live == 0
    assert house.scheduler.stats().pages_used == 0


async def test_cancelling_the_owner_in_mid_step_waits_for_it():
    house = House(delay_s=0.02)

    async def serve():
        async with house:
            await house.ask(house.request(max_tokens=50))

    server = asyncio.create_task(serve())
    await asyncio.sleep(0.03)
    assert house.runner.in_flight
    server.cancel()
    await asyncio.sleep(0)
    server.cancel()  # impatient
    with pytest.raises(asyncio.CancelledError):
        await server
    assert house.runner.in_flight == 0


async def test_cancelling_the_engine_task_itself_is_not_silent():
    async with House(delay_s=0.02) as house:
        client = asyncio.create_task(house.ask(house.request(max_tokens=50)))
        await asyncio.sleep(0.03)
        (task,) = (task for task in asyncio.all_tasks() if task.get_name() == "engine")
        task.cancel()
        with pytest.raises(EngineFailed) as failed:
            await client
        assert isinstance(failed.value.__cause__, asyncio.CancelledError)


async def test_deadlines_end_running_and_waiting_requests():
    limits = Limits(page_size=4, num_pages=48, max_slots=1, step_tokens=8)
    async with House(limits, delay_s=0.005) as house:
        soon = house.engine.time() + 0.04
        running = house.request(max_tokens=100, deadline=soon)
        waiting = house.request((7,), max_tokens=100, deadline=soon)
        (tokens, reason), (none, other) = await asyncio.gather(
            house.ask(running), house.ask(waiting)
        )
        assert (reason, other) == (Finish.DEADLINE, Finish.DEADLINE)
        assert tokens == alone(running)[0][: len(tokens)]
        assert none == []
        await house.assert_empty()


async def test_a_deadline_is_kept_while_nothing_can_run(monkeypatch):
    async with House() as house:
        monkeypatch.setattr(house.scheduler, "plan", lambda now: None)
        request = house.request(deadline=house.engine.time() + 0.05)
        client = asyncio.create_task(house.ask(request))
        await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(house.engine.drain(), 0.01)
        assert await asyncio.wait_for(client, 5) == ([], Finish.DEADLINE)
        await house.assert_empty()


async def test_drain_waits_for_the_last_request():
    async with House(delay_s=0.002) as house:
        await asyncio.wait_for(house.engine.drain(), 1)  # nothing to wait for
        client = asyncio.create_task(house.ask(house.request(max_tokens=10)))
        await asyncio.sleep(0)
        await asyncio.wait_for(house.engine.drain(), 5)
        assert (await client)[1] is Finish.LENGTH
        await house.assert_empty()


async def test_who_is_abandoned_hears_of_it_though_the_step_never_ends():
    async with House(delay_s=0.3) as house:
        ended = asyncio.create_task(house.engine.ended())
        async with house.engine.stream(house.request(max_tokens=40)) as events:
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            house.engine.abandon("a host is gone")
            with pytest.raises(EngineFailed, match="a host is gone"):
                await asyncio.wait_for(waiting, 0.1)
        with pytest.raises(EngineFailed, match="a host is gone"):
            async with house.engine.stream(house.request()):
                pass
        assert house.engine.failure is not None
        assert not house.engine.running
        await ended
