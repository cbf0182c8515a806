"""The whole engine on the device: 64 streams, a pool too small for them, some given up half way.

Every finished text, greedy or seeded, must be the text of the same request alone, with overlap and
without, whoever is preempted and wherever its pages go; and nothing may be left behind. float32, so
equality is token for token.
"""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import DoneEvent, Finish, Request, Sampling, StartEvent, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.step import StepShape
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner

BOUNDS = {"max_slots": 8, "step_tokens": 32, "max_context": 96, "page_size": 4, "num_pages": 60}
SHAPE = StepShape(**BOUNDS, host_pages=240)
# A head of its own: a tied one with random weights repeats its last token for ever.
CONFIG = replace(FAMILIES["gemma3"], tied_head=False)
POISON = 96  # a token whose embedding is not a number
UNPOISONED = ((POISON, -100.0),)


@pytest.fixture(scope="module")
def runner():
    def poison(arrays):
        arrays["embed.weight"][POISON] = np.nan

    runner, _ = build_runner(CONFIG, SHAPE, edit=poison)
    with runner:
        yield runner


def requests(count=64, seed=11):
    """Prompts of 1 to 40 tokens, half of them behind one of two common prefixes."""
    rng = np.random.default_rng(seed)
    common = [rng.integers(0, POISON, 18).tolist() for _ in range(2)]
    made = []
    for i in range(count):
        prompt = rng.integers(0, POISON, rng.integers(1, 23)).tolist()
        if i % 2:
            prompt = common[i % 4 // 2] + prompt
        kinds = (
            {"temperature": 0.0, "logit_bias": UNPOISONED},
            {
                "temperature": 0.0,
                "repetition_penalty": 1.2,
                "frequency_penalty": 0.5,
                "logit_bias": UNPOISONED,
            },
            {"temperature": 0.9, "seed": i, "top_p": 0.9, "logit_bias": UNPOISONED},
            {
                "temperature": 0.0,
                "stop_ids": frozenset(range(0, 97, 13)),
                "min_tokens": 3,
                "logit_bias": UNPOISONED,
            },
        )
        rules = Sampling(max_tokens=int(rng.integers(1, 45)), **kinds[i % 4])
        made.append((tuple(prompt), rules))
    return made


async def tokens_of(engine, prompt, rules, leave_after=None):
    got = []
    async with engine.stream(Request(engine.new_id(), prompt, rules)) as events:
        async for event in events:
            if isinstance(event, TokenEvent):
                got.append(event.token)
                if len(got) == leave_after:
                    return None
            if isinstance(event, DoneEvent):
                assert event.reason in (Finish.STOP, Finish.LENGTH)
    return got


def make_engine(runner, policy, overlap, host_pages=0):
    limits = Limits(**BOUNDS, host_pages=host_pages)
    cost = CostModel([0.002], page_out_s=1e-6, page_in_s=1e-6)
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost)
    return scheduler, Engine(scheduler, runner, overlap=overlap)


@pytest.fixture(scope="module")
def alone(runner):
    async def run():
        _, engine = make_engine(runner, "fcfs", overlap=False)
        async with engine:
            return [await tokens_of(engine, *request) for request in requests()]

    return asyncio.run(run())


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("policy", "host_pages"),
    [("fcfs", 0), ("mlfq", 240), ("mlfq", 30), ("adaptive", 240), ("adaptive", 0)],
)
async def test_together_equals_alone(runner, alone, policy, host_pages, overlap):
    scheduler, engine = make_engine(runner, policy, overlap, host_pages)
    leave = [1 + i % 7 if i % 5 == 3 else None for i in range(64)]
    with CompileCounter() as counter:
        async with engine:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(tokens_of(engine, *request, leave[i]))
                    for i, request in enumerate(requests())
                ]
                for i in range(12):  # and some are cut off from outside
                    gone = group.create_task(tokens_of(engine, *requests(80, 5)[64 + i]))
                    asyncio.get_running_loop().call_later(0.02 * i, gone.cancel)
            await engine.drain()
            stats = engine.stats()
    assert counter.compiles == 0
    assert stats.preemptions > 0, "the pool was meant to be too small"
    assert (stats.pages_in > 0) == (host_pages > 0)
    assert (stats.host_hit_tokens > 0) == (host_pages > 0)
    finished = [
        (task.result(), alone[i]) for i, task in enumerate(tasks) if task.result() is not None
    ]
    assert len(finished) > 40
    for got, want in finished:
        assert got == want
    scheduler.check()
    assert (stats.running, stats.waiting, stats.ending, stats.pages_used) == (0, 0, 0, 0)
    assert scheduler.live == 0


async def test_one_bad_sequence_ends_alone(runner, alone):
    """NaN in one request's own numbers: it gets an error, its neighbours their usual text, and
    whoever inherits its pages is unharmed."""
    scheduler, engine = make_engine(runner, "fcfs", overlap=True)
    picked = [0, 1, 4, 5]

    async def bad():
        rules = Sampling(max_tokens=20, temperature=0.0)
        prompt = (*range(20), POISON, *range(20))
        async with engine.stream(Request(engine.new_id(), prompt, rules)) as events:
            return [event async for event in events]

    async with engine:
        first = await asyncio.gather(bad(), *(tokens_of(engine, *requests()[i]) for i in picked))
        again = [await tokens_of(engine, *requests()[i]) for i in picked]
    assert [type(event) for event in first[0]] == [StartEvent, DoneEvent]
    assert first[0][1].reason is Finish.ERROR
    assert first[1:] == again == [alone[i] for i in picked]
    scheduler.check()
