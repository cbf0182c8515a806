"""Many schedulers in virtual time behind one router: what a fleet of them would do.

Each replica goes through its own steps, one after the other; they meet only in the router, which
knows what it gave to whom and what has ended. The caller's timer is the only clock here, and it is
not looked at for any decision.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .cost import CostModel
from .routing import Router
from .scheduler import MOST_IN_FLIGHT, Scheduler
from .simulate import Replay, Run
from .stats import together
from .types import DoneEvent, Request

_TELL_EVERY = 4096  # events


@dataclass(slots=True)
class Routing:
    """What the router did, and what its deciding took by the caller's timer."""

    decisions: int = 0
    route_s: float = 0.0
    most_load: float = 0.0  # tokens that one replica ever owed, and
    load_sum: float = 0.0  # at each decision that of the chosen one
    sent: dict[str, int] = field(default_factory=dict)  # requests by replica


class _Replica:
    __slots__ = ("replay", "wakes", "weights")

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.weights: dict[int, float] = {}  # by request: what the router was told
        self.wakes = False  # at the end of its oldest step

    def go_on(self, now: float) -> float | None:
        """Plans what may be planned; when the oldest step ends, None where there is none."""
        replay = self.replay
        while len(replay.flight) < MOST_IN_FLIGHT:
            if replay.plan(now) is None:
                break
        return replay.flight[0][1] if replay.flight else None


def simulate_replicas(
    schedulers: Sequence[Scheduler],
    router: Router,
    arrivals: Iterable[tuple[float, Request]],
    lengths: Mapping[int, int],
    device: CostModel,
    *,
    expected_tokens: float,
    beginnings: Callable[[int], Sequence[Hashable]],
    block_tokens: int,
    timer: Callable[[], float] = lambda: 0.0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Run, Routing]:
    """Play `arrivals`, which come in order of time, to their end.

    expected_tokens  of an answer, as the router has it of all
    beginnings       of a request's prompt, by its id, each `block_tokens` longer than the last
    """
    run, routing = Run([], schedulers[0].stats()), Routing()
    replicas = {
        f"{number}": _Replica(Replay(scheduler, device, lengths, run, timer))
        for number, scheduler in enumerate(schedulers)
    }
    for name in replicas:
        router.add(name)
    events: list[tuple[float, str]] = []  # ends of steps
    coming = iter(arrivals)
    following = next(coming, None)
    now, turns = 0.0, 0

    def wake(name: str, replica: _Replica, now: float) -> None:
        end_s = replica.go_on(now)
        replica.wakes = end_s is not None
        if end_s is not None:
            heapq.heappush(events, (end_s, name))

    while following is not None or events:
        turns += 1
        if following is not None and (not events or following[0] <= events[0][0]):
            now, request = following
            names, tokens = beginnings(request.id), len(request.prompt) + expected_tokens
            name = _send(router, routing, tokens, names, block_tokens, timer)
            replica = replicas[name]
            replica.weights[request.id] = tokens
            replica.replay.submit(now, request, now)
            if not replica.wakes:
                wake(name, replica, now)
            following = next(coming, None)
            if following is None:
                made = (scheduler.stats().output_tokens for scheduler in schedulers)
                run.offered_s, run.offered_tokens = now, sum(made)
        else:
            _, name = heapq.heappop(events)
            replica = replicas[name]
            now = max(now, replica.replay.commit())
            for event in replica.replay.told:
                if type(event) is DoneEvent:
                    router.ended(name, replica.weights.pop(event.request_id))
            wake(name, replica, now)
        if progress is not None and not turns % _TELL_EVERY:
            progress(sum(one.replay.finished for one in replicas.values()))
    assert not any(scheduler.live for scheduler in schedulers), "live requests, and nothing to run"
    run.end_s, run.stats = now, together([scheduler.stats() for scheduler in schedulers])
    return run, routing


def _send(
    router: Router,
    routing: Routing,
    tokens: float,
    names: Sequence[Hashable],
    block_tokens: int,
    timer: Callable[[], float],
) -> str:
    began = timer()
    name = router.route(names, tokens, block_tokens)
    routing.route_s += timer() - began
    assert name is not None, "there are replicas"
    load = router.load(name)
    routing.decisions += 1
    routing.load_sum += load
    routing.most_load = max(routing.most_load, load)
    routing.sent[name] = routing.sent.get(name, 0) + 1
    return name
