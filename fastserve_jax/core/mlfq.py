"""FastServe's skip-join multi-level feedback queue (Wu et al., "Fast Distributed Inference Serving
for Large Language Models", arXiv 2305.05920, algorithm 1 and section 4), and the naive one.

Knows levels and time, nothing of pages.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from .cost import CostModel, StepLoad
from .ordering import Policy
from .sequence import Limits, Sequence
from .types import Phase

_MOST_PROMOTED = 64  # by one step, so that a crowd starving together delays none
_GROWTH = 2  # of a quantum from one level to the next


@dataclass(slots=True)
class _Standing:
    level: int = 0
    served_s: float = 0.0  # since it entered its level
    waiting_since: float = 0.0


class SkipJoinMLFQ(Policy):
    """Level i grants quantum_s * 2**i of service. A new sequence skips the levels whose quantum its
    first token would overrun; one that used its quantum up sinks a level, to the end of the line
    there; one that waited `starve_s` rises to the first. Levels stand before priorities.

    Service is the time of every step a sequence was in, as the paper has it. `quantum_s` None is
    the shortest step there is. Without `skip_join` everybody joins the first level. With
    `proactive`, pages move to host memory ahead of need, in order of the estimated next scheduled
    time; as many pages as there are slots stay ready for a burst of new sequences.
    """

    preempts = True
    swaps = True

    def __init__(
        self,
        limits: Limits,
        cost: CostModel,
        *,
        quantum_s: float | None = None,
        starve_s: float = 0.3,
        levels: int = 16,
        skip_join: bool = True,
        proactive: bool = True,
    ) -> None:
        self._limits, self._cost = limits, cost
        self._starve_s = starve_s
        first_s = quantum_s or cost.step_s(StepLoad(0, 1))
        self._quanta_s = [first_s * _GROWTH**level for level in range(levels)]
        self._skip_join = skip_join
        self._counts = [0] * levels
        self._turn = 0
        self._now = 0.0  # when the last plan was begun
        self.starts_in = self._starts_in
        self._standings: dict[int, _Standing] = {}
        # Everybody starves after the same time, so beginning order is promotion order.
        self._waits: deque[tuple[float, Sequence]] = deque()
        self._proactive = proactive
        if proactive:
            self.reserve_pages = limits.max_slots

    def join(self, seq: Sequence, uncached_tokens: int, now: float) -> None:
        standing = self._standings[seq.id] = _Standing()
        last, level = len(self._quanta_s) - 1, 0
        if self._skip_join:
            first_token_s = self._cost.prefill_s(uncached_tokens, self._limits.step_tokens)
            while level < last and self._quanta_s[level] < first_token_s:
                level += 1
        self._counts[level] += 1
        standing.level = level
        self._enter(seq, standing, level)

    def wait(self, seq: Sequence, now: float) -> None:
        standing = self._standings[seq.id]
        standing.waiting_since = now
        if standing.level:
            self._waits.append((now, seq))

    def charge(self, seq: Sequence, tokens: int, elapsed_s: float) -> None:
        standing = self._standings[seq.id]
        standing.served_s += elapsed_s
        level = standing.level
        if standing.served_s >= self._quanta_s[level] and level + 1 < len(self._quanta_s):
            self._enter(seq, standing, level + 1)

    def finish(self, seq: Sequence, now: float) -> None:
        self._counts[self._standings.pop(seq.id).level] -= 1

    def due(self, now: float, spare_pages: int) -> list[Sequence]:
        self._now = now
        promoted: list[Sequence] = []
        waits = self._waits
        while len(promoted) < _MOST_PROMOTED and waits and waits[0][0] + self._starve_s <= now:
            since, seq = waits.popleft()
            standing = self._standings.get(seq.id)
            if standing is None or standing.waiting_since != since or not standing.level:
                continue
            if seq.phase is Phase.WAITING and not seq.in_flight:
                self._enter(seq, standing, 0)
                promoted.append(seq)
        return promoted

    def _starts_in(self, seq: Sequence) -> float:
        """ENST in seconds: when starvation would promote it, or when those above it have sunk to
        its level, whichever comes first (section 4.2)."""
        standing = self._standings[seq.id]
        promoted_s = standing.waiting_since + self._starve_s - self._now
        above_s = 0.0
        for level in range(standing.level):
            if self._counts[level]:
                above_s += self._counts[level] * sum(self._quanta_s[level : standing.level])
        return min(promoted_s, above_s / self._limits.max_slots)

    def copy_credit_s(self) -> float:
        return 0.0 if self._proactive else math.inf

    def levels(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def level(self, seq: Sequence) -> int:
        return self._standings[seq.id].level

    def _enter(self, seq: Sequence, standing: _Standing, level: int) -> None:
        self._turn += 1
        self._counts[standing.level] -= 1
        self._counts[level] += 1
        standing.level, standing.served_s = level, 0.0
        seq.rank = (level, seq.request.priority, 0.0, self._turn)
