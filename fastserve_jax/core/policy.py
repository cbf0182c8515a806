"""Who goes first. A policy ranks sequences and books their service; pages and slots are not its.

Order is kept as a rank on each sequence that changes only when something happens to it, so that
no step sorts everybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..errors import ConfigError
from .sequence import Sequence
from .types import Phase

_MOST_PROMOTED = 64  # by one step, so that a crowd starving together delays none

Cost = Callable[[int], float]  # tokens of one sequence run in one step -> seconds of service


def linear_cost_s(tokens: int) -> float:
    """A stand-in where nothing has been measured: 1 ms a step and 0.1 ms a token."""
    return 0.001 + 0.0001 * tokens


class Policy(Protocol):
    @property
    def preempts(self) -> bool:
        """Whether a waiting sequence may take the slot of a running one of lower rank."""

    def join(self, seq: Sequence, uncached_tokens: int) -> None:
        """Give a new sequence its rank; `uncached_tokens` of its prompt must be computed."""

    def wait(self, seq: Sequence, now: float) -> None:
        """`seq` begins to wait, new or preempted."""

    def charge(self, seq: Sequence, tokens: int) -> None:
        """`tokens` new positions of `seq` were computed; may change its rank."""

    def due(self, now: float) -> list[Sequence]:
        """Those waiting whose rank has just changed because time passed."""


class FirstComeFirstServed:
    """In order of arrival among equal priorities. Running sequences are never displaced."""

    preempts = False

    def __init__(self) -> None:
        self._turn = 0

    def join(self, seq: Sequence, uncached_tokens: int) -> None:
        self._turn += 1
        seq.rank = (0, seq.request.priority, self._turn)

    def wait(self, seq: Sequence, now: float) -> None:
        pass

    def charge(self, seq: Sequence, tokens: int) -> None:
        pass

    def due(self, now: float) -> list[Sequence]:
        return []


class SkipJoinMLFQ:
    """FastServe's multi-level feedback queue.

    Level i grants quantum_s * 2**i of service. A new sequence skips the levels whose quantum its
    first token would overrun; one that used its quantum up sinks a level, to the end of the line
    there; one that waited `starve_s` rises to the first. Levels stand before priorities.
    """

    preempts = True

    def __init__(
        self, cost_s: Cost, *, quantum_s: float = 0.01, starve_s: float = 0.3, levels: int = 16
    ) -> None:
        self._cost_s = cost_s
        self._starve_s = starve_s
        self._quanta_s = [quantum_s * 2**level for level in range(levels)]
        self._turn = 0
        # Everybody starves after the same time, so beginning order is promotion order.
        self._waits: deque[tuple[float, Sequence]] = deque()

    def join(self, seq: Sequence, uncached_tokens: int) -> None:
        first_token_s = self._cost_s(uncached_tokens)
        last = len(self._quanta_s) - 1
        covering = (i for i, quantum_s in enumerate(self._quanta_s) if quantum_s >= first_token_s)
        self._enter(seq, next(covering, last))

    def wait(self, seq: Sequence, now: float) -> None:
        seq.waiting_since = now
        if seq.level:
            self._waits.append((now, seq))

    def charge(self, seq: Sequence, tokens: int) -> None:
        seq.served_s += self._cost_s(tokens)
        if seq.served_s >= self._quanta_s[seq.level] and seq.level + 1 < len(self._quanta_s):
            self._enter(seq, seq.level + 1)

    def due(self, now: float) -> list[Sequence]:
        promoted: list[Sequence] = []
        while (
            len(promoted) < _MOST_PROMOTED
            and self._waits
            and self._waits[0][0] + self._starve_s <= now
        ):
            since, seq = self._waits.popleft()
            if seq.phase is Phase.WAITING and seq.waiting_since == since and seq.level:
                self._enter(seq, 0)
                promoted.append(seq)
        return promoted

    def _enter(self, seq: Sequence, level: int) -> None:
        self._turn += 1
        seq.level, seq.served_s = level, 0.0
        seq.rank = (level, seq.request.priority, self._turn)


POLICIES = ("fcfs", "mlfq")


def make_policy(
    name: str, *, cost_s: Cost = linear_cost_s, quantum_s: float = 0.01, starve_s: float = 0.3
) -> Policy:
    """The policy called `name`; raises ConfigError for an unknown one."""
    if name == "fcfs":
        return FirstComeFirstServed()
    if name == "mlfq":
        return SkipJoinMLFQ(cost_s, quantum_s=quantum_s, starve_s=starve_s)
    raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
