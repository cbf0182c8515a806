"""Several schedulers behind the face of one: the replicas of a mesh, which step together.

Each has slots and pages of its own, and a request stays with the one it was given to: the one that
would have the least to compute, its own prefix cache and what it was given before considered. A
step takes as long as its longest plan, so the cost model of each is told what that one weighed.
Stdlib only, like all of core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import InvalidRequest, Overloaded
from .cost import StepLoad
from .prefix import extend_chain
from .scheduler import Scheduler
from .stats import Stats, together
from .types import Ask, DoneEvent, Event, Plan, Proposed, Request, StepResult

_FIRST_GUESS = 128  # tokens of an answer, before any has ended
_GAIN = 0.02
_NOTHING = Plan(-1, (), ())


class Replicas:
    """Use in a Scheduler's place; its plans have one for each replica. There is no guessing."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        assert schedulers, "no replica"
        assert not any(s.limits.guesses for s in schedulers), "guessing is not for replicas"
        self._schedulers = tuple(schedulers)
        self._home: dict[int, int] = {}  # replica by request id
        self._owed: dict[int, float] = {}  # by request id: tokens that it was given for
        self._load = [0.0] * len(schedulers)  # of each, all that it is owed
        self._answer_tokens = float(_FIRST_GUESS)
        self._step = self._rejected = 0
        self._busy_s = self._stall_s = 0.0

    @property
    def live(self) -> int:
        return sum(scheduler.live for scheduler in self._schedulers)

    def submit(self, request: Request, now: float) -> None:
        """As Scheduler.submit; refused for want of room only where every replica would."""
        try:
            chosen = self._first_with_room(request, now)
        except (InvalidRequest, Overloaded):
            self._rejected += 1
            raise
        self._home[request.id] = chosen
        most = float(request.sampling.max_tokens)
        self._owed[request.id] = len(request.prompt) + min(most, self._answer_tokens)
        self._load[chosen] += self._owed[request.id]

    def _first_with_room(self, request: Request, now: float) -> int:
        *others, last = self._in_order(request)
        for replica in others:
            try:
                self._schedulers[replica].submit(request, now)
            except Overloaded:
                continue
            return replica
        self._schedulers[last].submit(request, now)
        return last

    def _in_order(self, request: Request) -> list[int]:
        """Who has the least to compute before it first."""
        size = self._schedulers[0].limits.page_size
        chain: list[bytes] = []
        extend_chain(chain, request.prompt, size, request.cache_salt, adapter=request.adapter)

        def ahead(replica: int) -> float:
            cached_tokens = self._schedulers[replica].cached_pages(chain) * size
            return self._load[replica] - cached_tokens

        return sorted(range(len(self._load)), key=ahead)

    def cancel(self, request_id: int) -> list[Event]:
        home = self._home.get(request_id)
        if home is None:
            return []
        return self._heard(self._schedulers[home].cancel(request_id))

    def expire(self, now: float) -> list[Event]:
        ended: list[Event] = []
        for scheduler in self._schedulers:
            ended += scheduler.expire(now)
        return self._heard(ended)

    def next_deadline(self) -> float | None:
        known = (scheduler.next_deadline() for scheduler in self._schedulers)
        return min((deadline for deadline in known if deadline is not None), default=None)

    def ask(self) -> Ask | None:
        return None

    def hear(self, ask: Ask, proposed: Proposed, elapsed_s: float) -> None:
        raise AssertionError("nothing was asked")

    def plan(self, now: float) -> Plan | None:
        plans = [scheduler.plan(now) for scheduler in self._schedulers]
        if not any(plans):
            return None
        made = tuple(plan or _NOTHING for plan in plans)
        joint = Plan(
            self._step,
            (),
            tuple(work for plan in made for work in plan.work),
            load=StepLoad(*map(max, zip(*(plan.load for plan in made), strict=True))),
            replicas=made,
        )
        self._step += 1
        return joint

    def commit(self, plan: Plan, result: StepResult, elapsed_s: float, now: float) -> list[Event]:
        self._busy_s += elapsed_s
        self._stall_s += self._schedulers[0].cost.stall_s(plan.load)
        events: list[Event] = []
        for scheduler, own in zip(self._schedulers, plan.replicas, strict=True):
            if own is not _NOTHING:
                events += scheduler.commit(own, result, elapsed_s, now, plan.load)
        return self._heard(events)

    def _heard(self, events: list[Event]) -> list[Event]:
        for event in events:
            if type(event) is DoneEvent:
                home = self._home.pop(event.request_id)
                self._load[home] -= self._owed.pop(event.request_id)
                self._answer_tokens += _GAIN * (event.output_tokens - self._answer_tokens)
        return events

    def stats(self) -> Stats:
        """Of all together."""
        every = [scheduler.stats() for scheduler in self._schedulers]
        return replace(
            together(every),
            rejected=self._rejected,
            steps=self._step,
            busy_s=self._busy_s,
            stall_s=self._stall_s,
        )

    def check(self) -> None:
        """Raise AssertionError when the books do not balance: for tests."""
        for scheduler in self._schedulers:
            scheduler.check()
        if not self._home:
            assert max(map(abs, self._load)) < 1e-6, "something is owed to nobody"
