"""One step being decided: which running sequences go on, who enters, who must make room.

Decodes come first, then prompt chunks and new sequences by rank from what is left of the token
budget. Room is only ever taken from lower ranks, so the first in rank always moves.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque

from .books import Books
from .pages import Release
from .policy import Policy
from .sequence import Sequence, by_rank
from .types import Admission, Plan, Work

_LOOK_AHEAD = 64  # waiting sequences passed over for want of pages before a step stops looking


class Draft:
    """Filled once by `make`, then thrown away.

    What leaving sequences will give back counts as granted (`claimed`) to those it was freed for,
    by rank, so that nobody is preempted twice for the same need.
    """

    def __init__(self, books: Books, policy: Policy, now: float) -> None:
        self._books = books
        self._limits = books.limits
        self._policy = policy
        self._now = now
        self._rows: dict[int, Sequence] = {}  # run one token each
        self._prefills: list[Sequence] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._chunk_tokens = 0
        self._admissions: list[Admission] = []
        self._aside: list[Sequence] = []  # to be queued again when the scan is over
        self._victims_left: list[Sequence] | None = None  # running, best rank first
        self._release: Release | None = None  # of all who are leaving
        self._claimed_pages = 0
        self._claimed_slots = 0
        self.preemptions = 0
        self.hit_tokens = 0  # taken from the prefix cache

    def make(self, step: int) -> Plan | None:
        """The plan, or None when nothing can run now."""
        growing = self._collect()
        if growing:
            self._grow(growing)
        self._fill()
        for seq in self._aside:
            self._books.waiting.push(seq)
        rows = [self._work(seq, 1) for seq in self._rows.values()]
        rows += [self._work(seq, count) for seq, count in self._chunks if count == 1]
        rows += [self._work(seq, count) for seq, count in self._chunks if count > 1]
        return Plan(step, tuple(self._admissions), tuple(rows)) if rows else None

    @property
    def _budget(self) -> int:
        return self._limits.step_tokens - len(self._rows) - self._chunk_tokens

    # Those who run already

    def _collect(self) -> list[Sequence]:
        """Sort the running into rows and prefills; returns the rows that need another page."""
        growing = []
        rows, page_size = self._rows, self._limits.page_size
        for seq in self._books.running.values():
            known, target, planned = len(seq.tokens) + seq.pending, seq.target, seq.planned
            left = (known if known < target else target) - planned  # seq.left, without the call
            if left == 1:
                rows[seq.id] = seq
                if planned == len(seq.pages) * page_size:
                    growing.append(seq)
            elif left > 1:
                self._prefills.append(seq)
        return growing

    def _grow(self, growing: list[Sequence]) -> None:
        """A page for each; where there are too few, lower ranks give theirs or stand still."""
        if len(growing) > self._books.index.available:
            growing.sort(key=by_rank)
        for seq in growing:
            if seq.id not in self._rows:
                continue  # has just made room for a better one
            if self._make_room(seq, pages=1):
                self._books.grow(seq)
            else:
                del self._rows[seq.id]

    # Prompt chunks and admissions

    def _fill(self) -> None:
        prefills = deque(sorted(self._prefills, key=by_rank))
        waiting = self._books.waiting
        looks = _LOOK_AHEAD
        while True:
            head = waiting.peek() if looks and self._is_open() else None
            if prefills and (head is None or prefills[0].rank < head.rank):
                if not self._budget:
                    return
                seq = prefills.popleft()
                if not seq.leaving and seq.slot >= 0:
                    self._chunk(seq)
            elif head is None:
                return
            else:
                waiting.pop()
                if not self._admit(head):
                    self._aside.append(head)
                    looks -= 1

    def _is_open(self) -> bool:
        """Whether looking at the next waiting sequence can come to anything."""
        books, head = self._books, self._books.waiting.peek()
        slot_free = self._claimed_slots < len(books.free_slots)
        if head is None or not (self._budget if slot_free else self._policy.preempts):
            return False
        candidates = self._candidates
        if candidates and candidates[-1].rank > head.rank:
            return True
        betters = len(candidates) + len(self._admissions)  # see _admit
        return slot_free and books.index.available - self._claimed_pages > betters

    def _chunk(self, seq: Sequence) -> None:
        count = min(seq.left, self._budget)
        self._chunks.append((seq, count))
        self._chunk_tokens += count

    def _admit(self, seq: Sequence) -> bool:
        """Let `seq` in, or make room for it by the next step, or change nothing."""
        books = self._books
        shared = books.match(seq)
        private = self._limits.pages_for(seq.entry_tokens) - len(shared)
        # A page for everybody before it, or their next page would throw it out again at once.
        betters = bisect(self._candidates, seq.rank, key=by_rank) + len(self._admissions)
        if not self._make_room(seq, pages=private + betters, slots=1, keep=shared):
            return False
        if not self._budget:
            return False
        books.admit(seq, shared, private)
        self.hit_tokens += seq.planned
        if seq.queued_s < 0:
            seq.queued_s, seq.cached_tokens = self._now - seq.submitted, seq.planned
        self._admissions.append(
            Admission(seq.id, seq.slot, tuple(seq.tokens), seq.prompt_tokens, seq.request.sampling)
        )
        self._chunk(seq)
        return True

    # Room

    def _make_room(
        self, seq: Sequence, *, pages: int, slots: int = 0, keep: list[int] | None = None
    ) -> bool:
        """Whether so much is free now. If not, preempt lower ranks where that is of use."""
        keep = keep or []
        if self._is_free(pages, slots, keep):
            return True
        victims = self._victims(seq, pages, slots, keep)
        if victims is None:
            return False
        for victim in victims:
            self._preempt(victim)
        if self._is_free(pages, slots, keep):
            return True
        self._claimed_pages += pages
        self._claimed_slots += slots
        return False

    def _is_free(self, pages: int, slots: int, keep: list[int]) -> bool:
        index = self._books.index
        spare = index.available - index.idle_among(keep) - self._claimed_pages
        return pages <= spare and slots <= len(self._books.free_slots) - self._claimed_slots

    def _victims(
        self, seq: Sequence, pages: int, slots: int, keep: list[int]
    ) -> list[Sequence] | None:
        """The lowest ranks whose leaving gives `seq` what it lacks; None if that is impossible."""
        books = self._books
        slots += self._claimed_slots - len(books.free_slots) - len(books.leaving)
        pages += self._claimed_pages - books.index.available + books.index.idle_among(keep)
        release = self._leaving_release.without(keep) if pages > 0 else books.pool.release()
        lower = self._candidates[bisect(self._candidates, seq.rank, key=by_rank) :]
        victims: list[Sequence] = []
        while slots > 0 or pages > release.pages:
            if not lower:
                return None
            victim = lower.pop()
            victims.append(victim)
            slots -= 1
            if pages > 0:
                release.add(victim.pages)
        return victims

    @property
    def _leaving_release(self) -> Release:
        if self._release is None:
            self._release = self._books.pool.release()
            for seq in self._books.leaving.values():
                self._release.add(seq.pages)
        return self._release

    @property
    def _candidates(self) -> list[Sequence]:
        """The running before this step's admissions, best rank first: who could make room."""
        if self._victims_left is None:
            self._victims_left = sorted(self._books.running.values(), key=by_rank)
        return self._victims_left

    def _preempt(self, victim: Sequence) -> None:
        assert self._candidates[-1] is victim
        self._candidates.pop()
        self._rows.pop(victim.id, None)
        self.preemptions += 1
        if self._books.leave(victim):
            self._policy.wait(victim, self._now)
            self._aside.append(victim)
        elif self._release is not None:
            self._release.add(victim.pages)

    def _work(self, seq: Sequence, count: int) -> Work:
        start, first_page = seq.planned, seq.sent_pages
        end = seq.planned = start + count
        known = len(seq.tokens) + seq.pending
        samples = end == known and known < seq.limit
        seq.in_flight += 1
        if samples:
            seq.pending += 1
        pages: tuple[int, ...] = ()
        if first_page * self._limits.page_size < end:
            seq.sent_pages = self._limits.pages_for(end)
            pages = tuple(seq.pages[first_page : seq.sent_pages])
        return Work(seq.id, seq.slot, start, count, first_page, pages, samples)
