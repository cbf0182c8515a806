"""The default policy: shortest expected work first, with three promises beside it.

    slice   a new sequence's first token comes soon, while the backlog is small enough to afford it
    late    nobody waits much longer than first come, first served would have made it wait
    work    everybody else by what is expected to be left (Gittins index over learned lengths)

Waiting makes work shorter in its eyes, an account beyond its fair part longer. Copies to and from
host memory are paid from a budget, so that they never take more than a small share of the time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .cost import CostModel
from .fairness import Fairness
from .ordering import Lengths, Policy, typical_step_s
from .predict import History
from .sequence import Limits, Sequence
from .types import Finish, Phase

_SLICE, _LATE, _WORK = range(3)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen by simulation (bench/bars.py); none of it depends on a workload's scale."""

    brevity: float = 1.0  # what seconds per token count beside seconds
    aging: float = 0.03  # seconds of work forgiven per second waited
    keep: float = 0.6  # work begun counts so much: no change of mind for little
    slice_share: float = 0.25  # of the slots, for first tokens
    small_backlog: float = 2.5  # mean service times; below, first tokens are promised
    slice_prompts: float = 0.05  # and while all prompts to come take less than so much of one
    late_share: float = 0.3125  # of the slots, for those who are late
    patience: float = 1.1  # late is later than so many times what fcfs would have taken
    fairness: float = 0.1  # seconds of work per second of the device beyond a fair part
    copy_share: float = 0.04  # of the time, for waiting on copies
    copy_burst_s: float = 0.5  # how much of it may be saved up
    settle_tokens: int = 8  # a sequence brought back from host memory runs at least so many


@dataclass(slots=True)
class _Standing:
    group: int
    turn: int
    prompt_s: float  # what of the prompt was not cached takes
    prefill_s: float  # of it, still to come
    level: int = _WORK
    next_edge: int = 0  # output tokens at which expectations are made anew
    counted: int = 0  # bins of the history in which it was seen to live on
    left: float = 0.0  # expected output tokens to come
    index: float = 0.0  # Gittins index, in tokens
    expected: float = 0.0  # output tokens, when it came
    fcfs_wait_s: float = 0.0  # what fcfs would have made it wait
    fcfs_start_s: float = 0.0  # and until its first step
    latest: float = 0.0  # start by then, or be late
    settled_at: int = 0  # output tokens before which it is not displaced
    is_settled: bool = False  # has run for more than its slice
    is_queued: bool = False  # among those to be ranked again


class Adaptive(Policy):
    preempts = True
    swaps = True

    def __init__(
        self,
        limits: Limits,
        cost: CostModel,
        *,
        lengths: Lengths | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self._limits, self._cost, self._lengths = limits, cost, lengths
        self._tuning = tuning or Tuning()
        self._history = History(limits.max_context, self._tuning.brevity)
        self._fairness = Fairness()
        self._standings: dict[int, _Standing] = {}
        self._fresh: list[tuple[float, int, Sequence]] = []  # first token not out, in that order
        self._latest: list[tuple[float, int, Sequence]] = []  # waiting, by latest start
        self._stale: deque[Sequence] = deque()  # in turn, to be ranked again
        self._counts = [0, 0, 0]
        self._turn = 0
        self._left_tokens = 0.0  # expected of all live
        self._prefill_left_s = 0.0
        self._step_s = 0.0  # moving average
        self._service_s = 0.0  # of a request alone in its slot, moving average
        self._credit_s = 0.0
        self._prediction_error = 0.0
        self.reserve_pages = limits.max_slots if limits.host_pages else 0

    # What happens to a sequence

    def join(self, seq: Sequence, uncached_tokens: int, now: float) -> None:
        if not self._step_s:
            self._step_s = typical_step_s(self._limits, self._cost)
        self._fairness.join(seq.request)
        prefill_s = self._cost.prefill_s(uncached_tokens, self._limits.step_tokens)
        self._turn += 1
        group = self._history.group(seq.prompt_tokens, seq.request.client)
        standing = _Standing(group, self._turn, prefill_s, prefill_s)
        self._standings[seq.id] = standing
        self._counts[_WORK] += 1
        self._prefill_left_s += prefill_s
        standing.fcfs_wait_s = self._backlog_s()
        ahead = max(0, len(self._standings) - self._limits.max_slots)
        standing.fcfs_start_s = ahead * self._mean_service_s() / self._limits.max_slots
        standing.fcfs_start_s += self._prefill_left_s - prefill_s
        self._expect(seq, standing, 0)
        standing.expected = max(standing.left, 1.0)
        self._sweep()
        heapq.heappush(self._fresh, (self._slice_order(seq, standing), standing.turn, seq))

    def wait(self, seq: Sequence, now: float) -> None:
        standing = self._standings[seq.id]
        if standing.level != _WORK and seq.output_tokens:
            self._move(standing, _WORK)
        standing.settled_at = 0
        self._rank(seq, standing)
        standing.latest = self._latest_start(seq, standing, now)
        heapq.heappush(self._latest, (standing.latest, standing.turn, seq))
        if not standing.is_queued:
            standing.is_queued = True
            self._stale.append(seq)

    def run(self, seq: Sequence, now: float, move_s: float) -> None:
        standing = self._standings[seq.id]
        if move_s > 0:
            worth = int(2.0 * move_s / max(self._step_s, 1e-9))
            standing.settled_at = seq.output_tokens + self._tuning.settle_tokens + worth
        standing.is_settled |= standing.level != _SLICE
        self._rank(seq, standing)

    def charge(self, seq: Sequence, tokens: int, elapsed_s: float) -> None:
        standing = self._standings[seq.id]
        if seq.request.client or seq.request.session:
            served_s = tokens * self._cost.token_s(self._limits.step_tokens)
            if tokens == 1:  # a row's share of the step, when all slots are taken
                served_s = self._step_s / self._limits.max_slots
            self._fairness.charge(seq.request, served_s)
        # With the one this step drew, unless the prompt goes on.
        output = len(seq.tokens) - seq.prompt_tokens + 1
        if seq.charged < seq.prompt_tokens:
            left = seq.prompt_tokens - seq.charged
            self._set_prefill(standing, self._cost.prefill_s(left, self._limits.step_tokens))
            return
        if standing.prefill_s or output >= standing.next_edge or output == standing.settled_at:
            self._set_prefill(standing, 0.0)
            standing.is_settled |= standing.level != _SLICE
            if standing.level == _SLICE:
                self._move(standing, _WORK)
            standing.counted = self._history.outlive(standing.group, output, standing.counted)
            self._expect(seq, standing, output)
            if seq.slot >= 0:
                self._rank(seq, standing)

    def finish(self, seq: Sequence, now: float) -> None:
        standing = self._standings.pop(seq.id)
        self._counts[standing.level] -= 1
        self._left_tokens -= standing.left
        self._prefill_left_s -= standing.prefill_s
        self._fairness.leave(seq.request)
        if seq.finish is Finish.ERROR:
            return
        output = seq.output_tokens
        ended = seq.finish is Finish.STOP
        self._history.record(standing.group, output, ended, standing.counted)
        if seq.finish in (Finish.STOP, Finish.LENGTH):
            miss = abs(output - standing.expected) / max(output, standing.expected)
            self._prediction_error += 0.02 * (miss - self._prediction_error)
            service_s = output * self._step_s + standing.prompt_s
            gain = max(0.02, 1.0 / (1.0 + self._turn))
            self._service_s += gain * (service_s - self._service_s)

    # What time does

    def due(self, now: float, spare_pages: int) -> list[Sequence]:
        changed = self._give_slices(spare_pages)
        changed += self._promote_late(now)
        for _ in range(min(2, len(self._stale))):
            seq = self._stale.popleft()
            standing = self._standings.get(seq.id)
            if standing is None:
                continue
            if seq.phase is not Phase.WAITING:
                standing.is_queued = False
                continue
            self._stale.append(seq)
            if standing.level == _WORK and not seq.in_flight:
                before = seq.rank
                self._expect(seq, standing, seq.output_tokens)
                self._rank(seq, standing)
                if abs(seq.rank[2] - before[2]) > 0.02 * abs(before[2]):
                    changed.append(seq)
                else:
                    seq.rank = before  # the queue knows it under this one
        return changed

    def step(self, elapsed_s: float, stall_s: float, now: float) -> None:
        tuning = self._tuning
        self._step_s += 0.01 * (elapsed_s - self._step_s)
        earned_s = self._credit_s + tuning.copy_share * elapsed_s - stall_s
        self._credit_s = min(tuning.copy_burst_s, earned_s)

    def copy_credit_s(self) -> float:
        return max(0.0, self._credit_s)

    def levels(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def numbers(self) -> Mapping[str, float]:
        return {
            "length_prediction_error": self._prediction_error,
            "backlog_seconds": self._backlog_s(),
            "promises_first_tokens": float(self._affords_slices()),
            "copy_credit_seconds": self._credit_s,
        }

    # Slices and lateness

    def _give_slices(self, spare_pages: int) -> list[Sequence]:
        most = max(1, int(self._tuning.slice_share * self._limits.max_slots))
        if not self._limits.host_pages:  # who is displaced may have to be computed again
            spare_pages -= self._limits.num_pages // 2
        changed: list[Sequence] = []
        fresh = self._fresh
        while fresh and self._counts[_SLICE] < most and self._affords_slices():
            order, _, seq = heapq.heappop(fresh)
            standing = self._standings.get(seq.id)
            waits = standing is not None and seq.phase is Phase.WAITING and not seq.in_flight
            if standing is None or not waits or seq.output_tokens or standing.level != _WORK:
                continue
            pages = self._limits.pages_for(seq.entry_tokens)
            if pages > spare_pages:
                continue  # for good: nothing is promised to whom room must first be made for
            spare_pages -= pages
            self._move(standing, _SLICE)
            seq.rank = (_SLICE, seq.request.priority, order, standing.turn)
            changed.append(seq)
        return changed

    def _affords_slices(self) -> bool:
        """First tokens for all who wait hold everybody up by all their prompts: what that adds to
        a mean service time must be small."""
        service_s, tuning = self._mean_service_s(), self._tuning
        if self._prefill_left_s > tuning.slice_prompts * service_s:
            return False
        return self._backlog_s() < self._small_backlog_s()

    def _promote_late(self, now: float) -> list[Sequence]:
        most = max(1, int(self._tuning.late_share * self._limits.max_slots))
        changed: list[Sequence] = []
        latest = self._latest
        while latest and latest[0][0] <= now and self._counts[_LATE] < most:
            at, _, seq = heapq.heappop(latest)
            standing = self._standings.get(seq.id)
            if standing is None or standing.latest != at or standing.level == _LATE:
                continue
            waits = seq.phase is Phase.WAITING and not seq.in_flight
            # One that runs, but whose prompt has yielded to shorter ones for long enough, counts.
            if waits or (seq.phase is Phase.RUNNING and standing.prefill_s):
                self._move(standing, _LATE)
                seq.rank = (_LATE, seq.request.priority, at, standing.turn)
                if waits:
                    changed.append(seq)
        return changed

    def _latest_start(self, seq: Sequence, standing: _Standing, now: float) -> float:
        """When it must start to be over within `patience` of what fcfs would have taken, or, where
        the client set a deadline that can be met, by that."""
        to_come_s = standing.left * self._step_s + standing.prefill_s
        served_s = seq.output_tokens * self._step_s
        fcfs_s = standing.fcfs_wait_s + served_s + to_come_s
        at = seq.submitted + self._tuning.patience * fcfs_s - to_come_s + self._excess_s(seq)
        if not seq.output_tokens and standing.fcfs_wait_s < self._small_backlog_s():
            at = min(at, seq.submitted + standing.fcfs_start_s)  # no later than fcfs starts it
        deadline = seq.request.deadline
        if deadline is not None and now + to_come_s < deadline:
            at = min(at, deadline - self._tuning.patience * to_come_s)
        return at

    def _sweep(self) -> None:
        """Drop entries of the past, so that the heaps stay within a multiple of who is live."""
        for heap in (self._fresh, self._latest):
            if len(heap) > 64 + 4 * len(self._standings):
                heap[:] = [entry for entry in heap if entry[2].id in self._standings]
                heapq.heapify(heap)
        if len(self._stale) > 64 + 4 * len(self._standings):
            self._stale = deque(seq for seq in self._stale if seq.id in self._standings)

    # Expectations and ranks

    def _backlog_s(self) -> float:
        """What all live requests still need of the device, if somebody has to wait for it."""
        slots = self._limits.max_slots
        if len(self._standings) <= slots:
            return 0.0
        return self._left_tokens * self._step_s / slots + self._prefill_left_s

    def _small_backlog_s(self) -> float:
        return self._tuning.small_backlog * self._mean_service_s()

    def _excess_s(self, seq: Sequence) -> float:
        return self._tuning.fairness * self._fairness.excess_s(seq.request)

    def _mean_service_s(self) -> float:
        return self._service_s or 256 * self._step_s

    def _expect(self, seq: Sequence, standing: _Standing, output: int) -> None:
        allowed = float(max(seq.request.sampling.max_tokens - output, 1))
        self._left_tokens -= standing.left
        if self._lengths is not None:
            left = index = max(self._lengths(seq.id) - output, 1.0, 0.2 * output)
            standing.next_edge = output + 8
        else:
            left, index, standing.next_edge = self._history.expect(standing.group, output)
        standing.left, standing.index = min(left, allowed), min(index, allowed)
        self._left_tokens += standing.left

    def _set_prefill(self, standing: _Standing, prefill_s: float) -> None:
        self._prefill_left_s += prefill_s - standing.prefill_s
        standing.prefill_s = prefill_s

    def _rank(self, seq: Sequence, standing: _Standing) -> None:
        if standing.level != _WORK:
            return
        tuning, request = self._tuning, seq.request
        # A prompt holds all slots up while it runs, hence its weight.
        ahead = self._limits.max_slots * standing.prefill_s / self._step_s
        work = standing.index + ahead
        if ahead and not seq.output_tokens and self._lengths is None:
            work = min(work, self._history.new_index_tokens(standing.group, ahead))
        work_s = work * self._step_s
        if standing.is_settled:
            work_s *= tuning.keep
        if seq.phase is Phase.RUNNING and seq.output_tokens + 1 < standing.settled_at:
            work_s = 0.0
        key = work_s + tuning.aging * seq.submitted
        if request.client or request.session:
            key += self._excess_s(seq)
        seq.rank = (_WORK, request.priority, key, standing.turn)

    def _slice_order(self, seq: Sequence, standing: _Standing) -> float:
        """By arrival, but a long prompt lets those before it who come while it would run."""
        return seq.submitted + standing.prefill_s + self._excess_s(seq)

    def _move(self, standing: _Standing, level: int) -> None:
        self._counts[standing.level] -= 1
        self._counts[level] += 1
        standing.level = level
