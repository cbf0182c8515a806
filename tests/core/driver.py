"""Drives a scheduler against the checking device by hand, balancing the books after every move."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import ORACLES, Policy, make_policy
from fastserve_jax.core.replicas import Replicas
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.sequence import Sequence
from fastserve_jax.core.types import (
    DoneEvent,
    Event,
    Finish,
    Plan,
    PromptEvent,
    Request,
    Sampling,
    Scored,
    StartEvent,
    StepResult,
    TokenEvent,
)
from fastserve_jax.errors import FastServeError
from tests.fakes import VOCAB, FakeDevice, alone


class Driver:
    """`overlap` plans may be in flight besides the one being made; `now` moves only by hand,
    however long a step is said to take.

    Copies cost next to nothing unless `cost` says otherwise. Only oracles are told of lengths.
    `vocab` different tokens are drawn: with few, a text often repeats what it said before.
    """

    def __init__(
        self,
        limits: Limits,
        policy: str | Policy = "fcfs",
        *,
        overlap: int = 1,
        nan: Collection[tuple[int, int]] = (),
        cost: CostModel | None = None,
        step_s: float = 0.01,
        vocab: int = VOCAB,
        replicas: int = 1,
    ) -> None:
        cost = cost or CostModel(page_out_s=1e-6, page_in_s=1e-6, overlaps=True)
        lengths = self._length if policy in ORACLES else None

        def scheduler() -> Scheduler:
            own = cost if replicas == 1 else cost.copy()
            made = make_policy(policy, limits, own, lengths) if isinstance(policy, str) else policy
            return Scheduler(limits, made, own)

        schedulers = [scheduler() for _ in range(replicas)]
        self.scheduler = schedulers[0] if replicas == 1 else Replicas(schedulers)
        self.devices = [FakeDevice(limits, vocab=vocab, nan=nan) for _ in range(replicas)]
        self.device = self.devices[0]
        self.vocab = vocab
        self.overlap, self.step_s = overlap, step_s
        self.now = 0.0
        self.in_flight: deque[tuple[Plan, StepResult]] = deque()
        self.plans: list[Plan] = []
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, list[int]] = {}
        self.scored: dict[int, list[Scored]] = {}
        self.started: dict[int, StartEvent] = {}
        self.done: dict[int, DoneEvent] = {}

    # Moves

    def submit(
        self,
        prompt: Iterable[int],
        max_tokens: int = 4,
        *,
        priority: int = 0,
        deadline: float | None = None,
        salt: str = "",
        client: str = "",
        session: str = "",
        seed: int = 0,
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        prompt_logprobs: int | None = None,
    ) -> int:
        sampling = Sampling(
            max_tokens,
            seed=seed,
            stop_ids=frozenset(stop_ids),
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
        )
        request_id = len(self.requests) + 1
        owner = salt, client, session
        request = Request(request_id, tuple(prompt), sampling, priority, deadline, *owner)
        self.requests[request_id] = request
        try:
            self.scheduler.submit(request, self.now)
        except FastServeError:
            del self.requests[request_id]
            raise
        self.outputs[request_id], self.scored[request_id] = [], []
        self._check()
        return request_id

    def cancel(self, request_id: int) -> None:
        self._hear(self.scheduler.cancel(request_id))

    def expire(self) -> None:
        self._hear(self.scheduler.expire(self.now))

    def plan(self) -> Plan | None:
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self._run(plan)))
        self._check()
        return plan

    def _run(self, plan: Plan) -> StepResult:
        if not plan.replicas:
            return self.device.run(plan)
        every = []
        for device, own in zip(self.devices, plan.replicas, strict=True):
            if own.step < 0:  # nothing to do
                assert own == Plan(own.step, (), ())
            else:
                every.append(device.run(own))
        joined: dict[str, Any] = {name: {} for name in ("sampled", "scored", "behind")}
        for result in every:
            for name, values in joined.items():
                assert not values.keys() & getattr(result, name).keys(), "done by two replicas"
                values |= getattr(result, name)
        return StepResult(**joined)

    def commit(self) -> None:
        plan, result = self.in_flight.popleft()
        self._hear(self.scheduler.commit(plan, result, self.step_s, self.now))

    def turn(self) -> Plan | None:
        """What the engine does once: plan, and commit when there is enough in flight."""
        plan = self.plan() if len(self.in_flight) <= self.overlap else None
        if self.in_flight and (plan is None or len(self.in_flight) > self.overlap):
            self.commit()
        return plan

    def until_preempted(self) -> None:
        """Stops between the plan that preempts and the next commit."""
        while not self.scheduler.stats().preemptions:
            if len(self.in_flight) > self.overlap:
                self.commit()
            else:
                self.plan()

    def run(self, most_turns: int = 2_000) -> None:
        """Until nobody is live; more turns than `most_turns` are starvation."""
        for _ in range(most_turns):
            if not self.scheduler.live:
                break
            flying = bool(self.in_flight)
            assert self.turn() or flying, "stuck"
        assert not self.scheduler.live, f"somebody starves: {self.scheduler.stats()}"
        while self.in_flight:
            self.commit()
        assert self.scheduler.stats().pages_used == 0

    def _hear(self, events: Iterable[Event]) -> None:
        for event in events:
            assert event.request_id not in self.done, "an event after the last"
            match event:
                case StartEvent(request_id):
                    assert request_id not in self.started, "started twice"
                    self.started[request_id] = event
                case TokenEvent(request_id, token):
                    assert request_id in self.started
                    self.outputs[request_id].append(token)
                case PromptEvent(request_id, scored):
                    self.scored[request_id] += scored
                case DoneEvent(request_id):
                    self.done[request_id] = event
        self._check()

    def _check(self) -> None:
        self.scheduler.check()
        levels = self.scheduler.stats().levels
        assert not levels or sum(levels) == len(self.requests) - len(self.done), "levels"

    # Questions

    def _length(self, request_id: int) -> float:
        return len(alone(self.requests[request_id], self.vocab)[0])

    def work(self, plan: Plan | None) -> list[tuple[int, int, int]]:
        """(request id, start, count) of each row."""
        return [(w.request_id, w.start, w.count) for w in plan.work] if plan else []

    def assert_all_as_alone(self) -> None:
        """Everybody finished got what it gets alone; the others a beginning of it."""
        for request_id, request in self.requests.items():
            output, reason = alone(request, self.vocab)
            done = self.done[request_id]
            assert done.output_tokens == len(self.outputs[request_id])
            if done.reason in (Finish.STOP, Finish.LENGTH):
                assert (self.outputs[request_id], done.reason) == (output, reason)
                if request.sampling.prompt_logprobs is not None:
                    positions = [scored.position for scored in self.scored[request_id]]
                    assert positions == list(range(1, len(request.prompt)))
            else:
                assert self.outputs[request_id] == output[: done.output_tokens]


def limits(**changes: int) -> Limits:
    """Small ones, with `changes`."""
    fields = {
        "page_size": 4,
        "num_pages": 64,
        "max_slots": 4,
        "step_tokens": 8,
        "max_context": 64,
    }
    return Limits(**(fields | changes))


def sequence(request_id: int = 1, prompt_tokens: int = 1, **fields: Any) -> Sequence:
    """For a policy to rank; `fields` are a request's."""
    request = Request(request_id, (0,) * prompt_tokens, Sampling(max_tokens=99), **fields)
    return Sequence(request, list(request.prompt))


def pressed(policy: str = "fcfs", *, overlap: int = 1) -> Driver:
    """Two sequences that fit together only at first."""
    driver = Driver(limits(num_pages=8), policy, overlap=overlap)
    driver.submit(range(6), max_tokens=20)
    driver.submit(range(20, 26), max_tokens=20)
    return driver


def known(index, chain):
    """The pages of the longest known prefix of `chain`."""
    pages = []
    for digest in chain:
        if index.find(digest) is None:
            break
        pages.append(index.find(digest))
    return pages
