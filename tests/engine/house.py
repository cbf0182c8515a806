"""An engine in real asyncio on the checking device, with everything a test wants to look at."""

import asyncio

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import (
    DoneEvent,
    Finish,
    Request,
    Sampling,
    TokenEvent,
)
from fastserve_jax.engine import Engine
from tests.fakes import VOCAB, FakeDevice, FakeRunner

LIMITS = Limits(page_size=4, num_pages=48, max_slots=8, step_tokens=24, max_context=64)


class House:
    """An engine with everything a test wants to look at."""

    def __init__(
        self,
        limits=LIMITS,
        policy="fcfs",
        *,
        overlap=True,
        delay_s=0.0,
        fail_at=None,
        vocab=VOCAB,
    ):
        self.scheduler = Scheduler(limits, make_policy(policy, limits, CostModel()))
        self.device = FakeDevice(limits, vocab=vocab)
        self.runner = FakeRunner(self.device, delay_s=delay_s, fail_at=fail_at)
        self.records = []
        self.engine = Engine(
            self.scheduler, self.runner, overlap=overlap, on_step=self.records.append
        )

    async def __aenter__(self):
        self.tasks = asyncio.all_tasks()
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *exit_info):
        await self.engine.__aexit__(*exit_info)
        self.scheduler.check()
        assert self.runner.in_flight == 0, "a step was left behind"
        assert asyncio.all_tasks() <= self.tasks, "a task was left behind"

    def request(self, prompt=(1, 2, 3), max_tokens=4, **rest) -> Request:
        deadline = rest.pop("deadline", None)
        return Request(
            self.engine.new_id(), tuple(prompt), Sampling(max_tokens, **rest), deadline=deadline
        )

    async def ask(self, request: Request) -> tuple[list[int], Finish]:
        async with self.engine.stream(request) as events:
            received = [event async for event in events]
        *_, done = received
        assert isinstance(done, DoneEvent)
        tokens = [event.token for event in received if isinstance(event, TokenEvent)]
        assert done.output_tokens == len(tokens)
        return tokens, done.reason

    async def assert_empty(self) -> None:
        await asyncio.wait_for(self.engine.drain(), 5)
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.ending, stats.pages_used) == (0, 0, 0, 0)
