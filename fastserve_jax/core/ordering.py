"""Who goes first. A policy ranks sequences and books their service; pages and slots are not its.

Order is kept as a rank on each sequence that changes only when something happens to it, so that
no step sorts everybody. Here: what every policy answers, and those with one simple order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .cost import CostModel
from .predict import History
from .sequence import Limits, Rank, Sequence, by_rank
from .types import Finish

Lengths = Callable[[int], float]  # request id -> its output tokens, known or predicted

_KEEP = 0.9  # a running sequence is this much shorter in the eyes of those that would displace it
_RANK_EVERY = 8  # tokens; ranks of the running need not follow every one


class Policy:
    """The questions a scheduler asks. Times are seconds on the caller's clock."""

    preempts = False  # may a waiting sequence take the slot of a running one of lower rank?
    swaps = False  # is what a preempted sequence computed worth a copy in host memory?
    reserve_pages = 0  # kept ready to be taken at once, free or already copied to host memory
    # A waiting sequence's distance from running, to be compared: who has the greatest can do
    # without its pages for longest.
    starts_in: Callable[[Sequence], Rank | float] = staticmethod(by_rank)

    def join(self, seq: Sequence, uncached_tokens: int, now: float) -> None:
        """Give a new sequence its rank; `uncached_tokens` of its prompt must be computed."""
        raise NotImplementedError

    def wait(self, seq: Sequence, now: float) -> None:
        """`seq` begins to wait, new or preempted."""

    def run(self, seq: Sequence, now: float, move_s: float) -> None:
        """`seq` takes a slot; to move its pages once costs `move_s`."""

    def charge(self, seq: Sequence, tokens: int, elapsed_s: float) -> None:
        """`tokens` new positions of `seq` were computed in a step of `elapsed_s`."""

    def finish(self, seq: Sequence, now: float) -> None:
        """`seq` is over, for whatever reason."""

    def due(self, now: float, spare_pages: int) -> list[Sequence]:
        """Those waiting whose rank has changed since they were queued, because time passed.
        `spare_pages` of the pool are nobody's, running or waiting."""
        return []

    def step(self, elapsed_s: float, stall_s: float, now: float) -> None:
        """A step ended; copies made it `stall_s` longer."""

    def takes(self, seq: Sequence, running: int) -> bool:
        """Whether `seq`, the first in the queue, may enter at all while so many run."""
        return True

    def copy_credit_s(self) -> float:
        """By how much copies may lengthen the next step. Without end: they are made when they are
        needed, and waited for (reactive swapping)."""
        return math.inf

    def levels(self) -> tuple[int, ...]:
        """How many live sequences stand at each level, where there are levels."""
        return ()

    def numbers(self) -> Mapping[str, float]:
        """What operators may want to see of this policy."""
        return {}


class FirstComeFirstServed(Policy):
    """In order of arrival among equal priorities. Running sequences are displaced only where the
    pool is full, and computed again: what vLLM does."""

    def __init__(self) -> None:
        self._turn = 0

    def join(self, seq: Sequence, uncached_tokens: int, now: float) -> None:
        self._turn += 1
        seq.rank = (0, seq.request.priority, 0.0, self._turn)


class RunToCompletion(FirstComeFirstServed):
    """Static batches: whoever waits when a batch is over makes up the next, as far as there are
    slots, and nobody else enters before all of it is over. What came before Orca."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._slots = limits.max_slots
        self._last_turn = self._left = 0  # of the batch

    def takes(self, seq: Sequence, running: int) -> bool:
        if running == 0:
            self._last_turn, self._left = self._turn, self._slots
        return self._left > 0 and seq.rank[3] <= self._last_turn

    def run(self, seq: Sequence, now: float, move_s: float) -> None:
        self._left -= 1


class ShortestFirst(Policy):
    """By service: of the whole request (SJF, nothing displaced) or of what is left of it (SRPT).

    `lengths` are an oracle's, or predictions; None takes what outputs of the past lead to expect.
    A running sequence counts as 0.9 of it, so that equals do not displace each other in turn.
    """

    swaps = True

    def __init__(
        self, limits: Limits, cost: CostModel, lengths: Lengths | None, *, left: bool
    ) -> None:
        self.preempts = left
        self._limits, self._cost, self._lengths = limits, cost, lengths
        self._history = History(limits.max_context)
        self._turn = 0
        self._prefill_s: dict[int, float] = {}
        self._step_s = 0.0

    def join(self, seq: Sequence, uncached_tokens: int, now: float) -> None:
        if not self._step_s:
            self._step_s = typical_step_s(self._limits, self._cost)
        self._prefill_s[seq.id] = self._cost.prefill_s(uncached_tokens, self._limits.step_tokens)
        self._turn += 1
        self._rank(seq, self._turn, 1.0)

    def wait(self, seq: Sequence, now: float) -> None:
        if self.preempts:
            self._rank(seq, seq.rank[3], 1.0)

    def run(self, seq: Sequence, now: float, move_s: float) -> None:
        if self.preempts:
            self._rank(seq, seq.rank[3], _KEEP)

    def charge(self, seq: Sequence, tokens: int, elapsed_s: float) -> None:
        output = seq.output_tokens
        if output == 0:
            left = max(0, seq.prompt_tokens - seq.charged)
            self._prefill_s[seq.id] = self._cost.prefill_s(left, self._limits.step_tokens)
        if self.preempts and output % _RANK_EVERY == 0 and seq.slot >= 0:
            self._rank(seq, seq.rank[3], _KEEP)

    def finish(self, seq: Sequence, now: float) -> None:
        del self._prefill_s[seq.id]
        group = self._history.group(seq.prompt_tokens, seq.request.client)
        self._history.record(group, seq.output_tokens, ended=seq.finish is Finish.STOP)

    def step(self, elapsed_s: float, stall_s: float, now: float) -> None:
        self._step_s += 0.02 * (elapsed_s - self._step_s)

    def _left(self, seq: Sequence) -> float:
        if self._lengths is not None:
            return max(self._lengths(seq.id) - seq.output_tokens, 1.0)
        group = self._history.group(seq.prompt_tokens, seq.request.client)
        left = self._history.left_tokens(group, seq.output_tokens)
        return min(left, float(max(seq.limit - len(seq.tokens), 1)))

    def _rank(self, seq: Sequence, turn: int, factor: float) -> None:
        # In steps, so that ranks made at different times compare whatever a step takes by then.
        left = self._left(seq) + self._prefill_s[seq.id] / self._step_s
        seq.rank = (0, seq.request.priority, factor * left, turn)


def typical_step_s(limits: Limits, cost: CostModel) -> float:
    """A first guess of what a step with all slots decoding takes."""
    return cost.base_s[-1] + cost.decode_row_s * limits.max_slots
