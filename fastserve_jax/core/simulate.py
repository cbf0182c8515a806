"""The scheduler in virtual time: arrivals and a device's cost model in, what became of each out.

Steps follow each other as in the engine: with overlap a plan is made while the step before it
runs, so what comes in between is planned one step later, and a stop is noticed one step late. The
caller's timer is the only clock here, and it is not looked at for any decision.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .cost import CostModel
from .scheduler import Scheduler
from .stats import Stats
from .types import DoneEvent, Event, Finish, Plan, Request, Sampled, StepResult, TokenEvent

STOP = 2  # the simulated device's last token of everybody
_OWN_TOKENS = 1 << 30  # and, with a request's number, all others


@dataclass(slots=True)
class Life:
    """One request, in seconds of virtual time; -1 where it has not come to that."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int  # wanted
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    done_s: float = -1.0
    longest_gap_s: float = 0.0  # between two of its tokens
    produced: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The scheduler at one moment."""

    time_s: float
    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    host_pages_used: int
    levels: tuple[int, ...]
    policy: Mapping[str, float]  # what the policy says of itself


@dataclass(slots=True)
class Run:
    lives: list[Life]
    stats: Stats
    end_s: float = 0.0
    busy_s: float = 0.0
    stall_s: float = 0.0  # of it, by which copies made steps longer
    plan_commit_s: float = 0.0  # of the real clock, in all steps
    steps: int = 0
    offered_s: float = 0.0  # until the last arrival
    offered_tokens: int = 0  # produced by then: what comes after is a device running empty
    samples: list[Sample] = field(default_factory=list)


class Replay:
    """One scheduler and its device."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: CostModel,
        lengths: Mapping[int, int],
        run: Run,
        timer: Callable[[], float],
    ) -> None:
        self.scheduler, self.device, self.lengths, self.run = scheduler, device, lengths, run
        self.timer = timer
        self.lives: dict[int, Life] = {}
        self.prompt_tokens: dict[int, int] = {}
        self.flight: deque[tuple[Plan, float]] = deque()  # and when its step ends
        self.tokens: dict[int, Sampled] = {}  # what each draws: its own, so nobody shares a page
        self.free_at = 0.0  # when the device is
        self.told: list[Event] = []  # by the last commit
        self.finished = 0

    def submit(self, arrival_s: float, request: Request, now: float) -> None:
        wanted = min(self.lengths[request.id], request.sampling.max_tokens)
        life = Life(request.id, arrival_s, len(request.prompt), wanted)
        self.lives[request.id] = life
        self.run.lives.append(life)
        self.prompt_tokens[request.id] = len(request.prompt)
        self.tokens[request.id] = Sampled(_OWN_TOKENS + request.id)
        self.scheduler.submit(request, now)

    def plan(self, now: float) -> Plan | None:
        started = self.timer()
        plan = self.scheduler.plan(now)
        self.run.plan_commit_s += self.timer() - started
        if plan is not None:
            self._dispatch(plan, now)
        return plan

    def _dispatch(self, plan: Plan, now: float) -> None:
        began = max(now, self.free_at)
        self.free_at = began + self.device.step_s(plan.load)
        self.run.stall_s += self.device.stall_s(plan.load)
        self.run.busy_s += self.free_at - began
        self.run.steps += 1
        self.flight.append((plan, self.free_at))

    def commit(self) -> float:
        """The oldest step ends; returns when."""
        plan, end_s = self.flight.popleft()
        sampled = {}
        for work in plan.work:
            if work.samples:
                made = work.start + work.count - self.prompt_tokens[work.request_id] + 1
                last = made >= self.lengths[work.request_id]
                sampled[work.request_id] = _STOP if last else self.tokens[work.request_id]
        step_s, started = self.device.step_s(plan.load), self.timer()
        self.told = events = self.scheduler.commit(plan, StepResult(sampled), step_s, end_s)
        self.run.plan_commit_s += self.timer() - started
        for event in events:
            life = self.lives[event.request_id]
            if type(event) is TokenEvent:
                if life.produced:
                    life.longest_gap_s = max(life.longest_gap_s, end_s - life.last_token_s)
                else:
                    life.first_token_s = end_s
                life.last_token_s = end_s
                life.produced += 1
            elif type(event) is DoneEvent:
                if event.reason in (Finish.STOP, Finish.LENGTH):
                    life.done_s = end_s
                self.finished += 1
        return end_s

    def sample(self, now: float) -> Sample:
        stats = self.scheduler.stats()
        pages = stats.pages_used, stats.pages_cached, stats.host_pages_used
        return Sample(now, stats.running, stats.waiting, *pages, stats.levels, stats.policy)


_STOP = Sampled(STOP)


def simulate(
    scheduler: Scheduler,
    arrivals: Iterable[tuple[float, Request]],
    lengths: Mapping[int, int],
    device: CostModel,
    *,
    timer: Callable[[], float] = lambda: 0.0,
    overlap: bool = True,
    sample_every_s: float = 0.0,
    until_s: float = math.inf,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Play `arrivals`, which come in order of time, to their end or to `until_s`.

    lengths   request id -> output tokens, the last of which is STOP; requests must name it as a
              stop id
    device    what steps really take; the scheduler's own model is another and learns from it
    timer     seconds of the real clock, for `plan_commit_s`
    progress  hears how many requests are over
    """
    coming = iter(arrivals)
    following = next(coming, None)
    run = Run([], scheduler.stats())
    replay = Replay(scheduler, device, lengths, run, timer)
    most_in_flight = 2 if overlap else 1
    now, next_sample = 0.0, 0.0
    while now < until_s:
        while following is not None and following[0] <= now:
            replay.submit(*following, now)
            following = next(coming, None)
            if following is None:
                run.offered_s, run.offered_tokens = now, scheduler.stats().output_tokens
        plan = replay.plan(now)
        if replay.flight and (plan is None or len(replay.flight) == most_in_flight):
            now = replay.commit()
            if progress is not None and not run.steps % 256:
                progress(replay.finished)
        elif plan is None:
            if following is None:
                assert not scheduler.live, "live requests, nothing to run and nothing to come"
                break
            now = following[0]
        if sample_every_s and now >= next_sample:
            run.samples.append(replay.sample(now))
            next_sample = now + sample_every_s
    while following is not None:
        at, request = following
        run.lives.append(Life(request.id, at, len(request.prompt), lengths[request.id]))
        following = next(coming, None)
    run.end_s, run.stats = now, scheduler.stats()
    if progress is not None:
        progress(replay.finished)
    return run
