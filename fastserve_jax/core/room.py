"""Who makes room in one step: those running that rank lower, and the pages of those that wait.

Orders are made when first asked for, and once. Finds out; carries out nothing.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import KeysView
from itertools import accumulate, islice

from .books import Books
from .ordering import Policy
from .sequence import Sequence, by_rank


class Room:
    """`begin` is called before each step, `changed` after every change to pages."""

    def __init__(self, books: Books, policy: Policy) -> None:
        self._books, self._policy = books, policy
        self._running: list[Sequence] | None = None
        self._keepers: list[Sequence] = []  # who waits and keeps pages, last to start last
        self._is_sorted = False
        self._newer: list[Sequence] = []  # who may keep pages since that order was made
        self._giving = -1  # who loses pages in this step; -1: nobody yet
        self._dirty: list[int] = []  # of the first pages to go, those without a copy

    def begin(self) -> None:
        self._running, self._is_sorted, self._giving = None, False, -1
        self._newer = []
        self.changed()

    @property
    def running(self) -> list[Sequence]:
        """The running before this step's admissions, best rank first: who could make room."""
        if self._running is None:
            self._running = sorted(self._books.running.values(), key=by_rank)
        return self._running

    def better(self, seq: Sequence) -> int:
        """How many of them rank above `seq`."""
        return bisect(self.running, seq.rank, key=by_rank)

    def victims(
        self, seq: Sequence, pages: int, slots: int, keep: list[int]
    ) -> list[Sequence] | None:
        """The lowest ranks whose leaving gives `seq` what it lacks; None if that is impossible."""
        books = self._books
        slots -= len(books.free_slots)
        pages -= books.index.available - (books.index.idle_among(keep) if keep else 0)
        if slots <= 0 and pages <= 0:
            return []
        release = books.pool.release(keep)
        lower = self.running[self.better(seq) :]
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

    def left(self, victim: Sequence) -> None:
        """`victim` has made room. What copies of its own pages will take is not foreseen in this
        step: to let in fewer for that costs more than it saves (bench/bars.py, sharegpt)."""
        last = self.running.pop()
        assert last is victim, "the lowest rank goes first"
        self._newer.append(victim)
        self.changed()

    def fetched(self, seq: Sequence) -> None:
        """Pages have been taken, and are kept for `seq`."""
        self._newer.append(seq)
        self.changed()

    def changed(self) -> None:
        """Pages have been taken or given back."""
        self._dirty = []

    def last(self, keepers: KeysView[int]) -> int:
        """Of those that wait, the one that can do without its pages for longest; in one step the
        same as before while it has any, or two would have to fetch what they lack."""
        if self._giving not in keepers:
            found = [seq for seq in self._newer if seq.id in keepers]
            found += islice((seq for seq in reversed(self._order()) if seq.id in keepers), 1)
            self._giving = max(found, key=self._policy.starts_in).id
        return self._giving

    def next_to_go(self, count: int) -> list[tuple[int, bytes]]:
        """The first `count` pages, with their names, that would have to go: of those who wait, then
        of the running, lowest rank first. Full pages stay as they are while their owner runs on."""
        index = self._books.index
        pages: list[tuple[int, bytes]] = []
        for keeper in reversed(self._order()):
            if len(pages) >= count:
                break
            pages += [(page, index.digest(page)) for page in index.kept(keeper.id)]
        for seq in reversed(self.running):
            if len(pages) >= count:
                break
            full = reversed(seq.pages[: seq.indexed_pages])
            pages += [(page, name) for page in full if (name := index.name(page)) is not None]
        return pages[:count]

    def dirty(self, pages: int) -> int:
        """Of so many to be taken, those that must be copied before."""
        short = pages - self._books.index.disposable
        if short <= 0:
            return 0
        dirty = self._dirty
        if len(dirty) < short:  # more than asked for: others will ask
            host = self._books.host
            lack = (digest not in host for _, digest in self.next_to_go(2 * short))
            dirty[:] = accumulate(lack)
        # Beyond those are pages that are not full yet.
        return dirty[short - 1] if short <= len(dirty) else short - len(dirty) + sum(dirty[-1:])

    def _order(self) -> list[Sequence]:
        if not self._is_sorted:
            keepers, sequences = self._books.index.keepers, self._books.sequences
            order = [seq for seq in self._keepers if seq.id in keepers]  # almost in order still
            if len(order) < len(keepers):
                known = {seq.id for seq in order}
                order += [sequences[keeper] for keeper in keepers if keeper not in known]
            order.sort(key=self._policy.starts_in)
            self._keepers, self._is_sorted = order, True
        return self._keepers
