"""Who owns which slot and pages, and in which phase everybody is. Carries out; decides nothing.

A preempted or ended sequence with work in flight is `leaving`: it keeps slot and pages until the
last of that work is committed, so that nothing in flight ever reads what somebody else writes.
"""

from __future__ import annotations

from .pages import PagePool
from .prefix import PrefixIndex, extend_chain
from .sequence import Limits, Sequence
from .types import Finish, Phase
from .waiting import WaitingQueue


class Books:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sequences: dict[int, Sequence] = {}  # everybody not DONE, by request id
        self.running: dict[int, Sequence] = {}  # those with a slot that may be planned
        self.leaving: dict[int, Sequence] = {}
        self.waiting = WaitingQueue()
        self.pool = PagePool(limits.num_pages)
        self.index = PrefixIndex(self.pool)
        self.free_slots = list(range(limits.max_slots - 1, -1, -1))

    def enter(self, seq: Sequence) -> None:
        """A new sequence; its prompt's digests are made here, once."""
        self._extend_chain(seq, seq.prompt_tokens)
        self.sequences[seq.id] = seq

    def match(self, seq: Sequence) -> list[int]:
        """Pages of others that begin as `seq` does and that it may use."""
        return self.index.match(seq.chain[: seq.shareable_tokens // self.limits.page_size])

    def admit(self, seq: Sequence, shared: list[int], private: int) -> None:
        """Give `seq` a slot, the `shared` pages and `private` new ones."""
        seq.move(Phase.RUNNING)
        seq.slot = self.free_slots.pop()
        self.index.share(shared)
        seq.pages = [*shared, *self.index.take(private)]
        seq.indexed_pages = len(shared)
        seq.next_full = (len(shared) + 1) * self.limits.page_size
        seq.sent_pages = 0
        seq.planned = seq.computed = len(shared) * self.limits.page_size
        seq.charged = max(seq.charged, seq.computed)
        self.running[seq.id] = seq

    def grow(self, seq: Sequence) -> None:
        seq.pages += self.index.take(1)

    def share_full_pages(self, seq: Sequence) -> None:
        """Offer the pages that `computed` now fills."""
        size = self.limits.page_size
        full = seq.computed // size
        self._extend_chain(seq, full * size)
        for page in range(seq.indexed_pages, full):
            self.index.offer(seq.chain[page], seq.pages[page])
        seq.indexed_pages = full
        seq.next_full = (full + 1) * size

    def leave(self, seq: Sequence) -> bool:
        """Take `seq` out of what runs. True when nothing of it was in flight: it has left."""
        self.running.pop(seq.id, None)
        seq.leaving = True
        self.leaving[seq.id] = seq
        return seq.in_flight == 0 and self.left(seq)

    def left(self, seq: Sequence) -> bool:
        """Give slot and pages of a leaving sequence back. True: the caller queues it again."""
        assert seq.in_flight == 0
        assert seq.pending == 0
        del self.leaving[seq.id]
        self.index.release(seq.pages)
        self.free_slots.append(seq.slot)
        seq.pages, seq.slot, seq.leaving = [], -1, False
        seq.planned = seq.computed = seq.sent_pages = seq.indexed_pages = 0
        if seq.finish is None:
            seq.move(Phase.WAITING)
            return True
        self._forget(seq)
        return False

    def end(self, seq: Sequence, reason: Finish) -> None:
        """`seq` is over: it gets no more work, and gives back what it has as soon as may be."""
        seq.finish = reason
        if seq.phase is Phase.WAITING:
            self.waiting.discard(seq)
            self._forget(seq)
        elif seq.in_flight:
            seq.move(Phase.ENDING)
            self.leave(seq)
        else:
            self.leave(seq)

    def _forget(self, seq: Sequence) -> None:
        seq.move(Phase.DONE)
        del self.sequences[seq.id]

    def _extend_chain(self, seq: Sequence, end: int) -> None:
        size = self.limits.page_size
        if end // size > len(seq.chain):
            extend_chain(seq.chain, seq.tokens[:end], size, seq.request.cache_salt)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        held: dict[int, int] = {}
        slots = list(self.free_slots)
        waiting = {seq.id for seq in self.waiting.members()}
        for seq in self.sequences.values():
            self._check_sequence(seq, seq.id in waiting)
            for page in seq.pages:
                held[page] = held.get(page, 0) + 1
            if seq.slot >= 0:
                slots.append(seq.slot)
        self.index.check(held)
        assert sorted(slots) == list(range(self.limits.max_slots)), "a slot lost or owned twice"
        owners = len(self.running) + len(self.leaving)
        assert len(waiting) + owners == len(self.sequences), "a sequence lost or in two places"

    def _check_sequence(self, seq: Sequence, waits: bool) -> None:
        name = f"request {seq.id}"
        assert (seq.phase is Phase.WAITING) == waits, f"{name}: {seq.phase} and waiting {waits}"
        assert (seq.id in self.leaving) == seq.leaving, f"{name}: leaving"
        assert (seq.phase is Phase.ENDING) <= seq.leaving, f"{name}: ending, not leaving"
        assert (seq.finish is not None) == (seq.phase is Phase.ENDING), f"{name}: {seq.finish}"
        if waits:
            assert not seq.pages, f"{name} waits with pages"
            assert seq.slot < 0, f"{name} waits with a slot"
            assert not seq.in_flight, f"{name} waits in flight"
        else:
            assert (seq.id in self.running) != seq.leaving, f"{name}: running and leaving"
            assert seq.in_flight or not seq.leaving, f"{name} should have left"
        assert 0 <= seq.pending <= seq.in_flight <= 2, f"{name}: in flight"
        assert (seq.computed == seq.planned) or seq.in_flight, f"{name}: planned, never run"
        assert seq.computed <= seq.planned <= seq.target, f"{name}: planned beyond its end"
        assert seq.planned <= len(seq.pages) * self.limits.page_size, f"{name}: too few pages"
        assert seq.sent_pages <= len(seq.pages), f"{name}: pages sent"
        assert len(seq.tokens) + seq.pending <= seq.limit, f"{name}: too many tokens"
        assert len(set(seq.pages)) == len(seq.pages), f"{name} holds a page twice"
