"""Several schedulers behind the face of one: the replicas of a mesh, which step together.

Each has slots and pages of its own, and a request stays with the one it was given to: the one that
would have the least to compute, its own prefix cache and what it was given before considered. A
step takes as long as its longest plan, so the cost model of each is told what that one weighed.
Stdlib only, like all of core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from ..errors import Overloaded
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
        self._flight: deque[Plan] = deque()
        self._step = self._rejected = 0

    @property
    def live(self) -> int:
        return sum(scheduler.live for scheduler in self._schedulers)

    def submit(self, request: Request, now: float) -> None:
        """As Scheduler.submit; refused only where every replica would."""
        chosen = self._choose(request)
        try:
            self._schedulers[chosen].submit(request, now)
        except Overloaded:
            chosen = min(range(len(self._load)), key=lambda r: self._schedulers[r].live)
            self._schedulers[chosen].submit(request, now)
        self._home[request.id] = chosen
        most = float(request.sampling.max_tokens)
        self._owed[request.id] = len(request.prompt) + min(most, self._answer_tokens)
        self._load[chosen] += self._owed[request.id]

    def _choose(self, request: Request) -> int:
        size = self._schedulers[0].limits.page_size
        chain: list[bytes] = []
        extend_chain(chain, request.prompt, size, request.cache_salt)

        def ahead(replica: int) -> float:
            cached_tokens = self._schedulers[replica].cached_pages(chain) * size
            return self._load[replica] - cached_tokens

        return min(range(len(self._load)), key=ahead)

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
            tuple(admission for plan in made for admission in plan.admissions),
            tuple(work for plan in made for work in plan.work),
            load=StepLoad(*map(max, zip(*(plan.load for plan in made), strict=True))),
            replicas=made,
        )
        self._step += 1
        self._flight.append(joint)
        return joint

    def commit(self, plan: Plan, result: StepResult, elapsed_s: float, now: float) -> list[Event]:
        assert plan is self._flight.popleft(), "plans are committed in order"
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
        busy_s = max(stats.busy_s for stats in every)
        return replace(together(every), steps=self._step, busy_s=busy_s)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance: for tests."""
        for scheduler in self._schedulers:
            scheduler.check()
        if not self._home:
            assert max(map(abs, self._load)) < 1e-6, "something is owed to nobody"
