"""Kept orders against plain searches, at every question asked in random lives."""

import random
from collections import Counter

from fastserve_jax.core import scheduler
from fastserve_jax.core.room import Room
from tests.core.lives import draw


def test_orders_that_are_kept_are_those_a_search_finds(monkeypatch):
    asked = Counter()

    class Searched(Room):
        def begin(self):
            super().begin()
            self.kept = None  # who keeps pages when the order is made

        def last(self, keepers):
            starts = {k: self._policy.starts_in(self._books.sequences[k]) for k in keepers}
            before = self._giving
            last = super().last(keepers)
            if before in keepers:
                assert last == before
                asked["the same again"] += starts[last] < max(starts.values())
            else:
                assert starts[last] == max(starts.values())
                asked["last of several"] += len(starts) > 1
            return last

        def _order(self):
            if not self._is_sorted:
                self.kept = set(self._books.index.keepers)
            return super()._order()

        def next_to_go(self, count):
            books = self._books
            found = super().next_to_go(count)
            order = sorted(self.kept & books.index.keepers, key=self._key, reverse=True)
            pages = [page for keeper in order for page in books.index.kept(keeper)]
            for seq in sorted(books.running.values(), key=lambda seq: seq.rank, reverse=True):
                if seq in self.running:  # not if it has just entered
                    full = seq.pages[: seq.indexed_pages]
                    pages += [page for page in reversed(full) if books.index.name(page)]
            if len({self._key(keeper) for keeper in order}) == len(order):
                assert [page for page, _ in found] == pages[:count]
            asked["pages to go"] += len(found) > 1
            return found

        def dirty(self, pages):
            books = self._books
            short = max(pages - books.index.disposable, 0)
            clean = sum(digest in books.host for _, digest in self.next_to_go(short))
            dirty = super().dirty(pages)
            assert dirty == short - clean
            asked["some dirty"] += 0 < dirty < short
            return dirty

        def _key(self, keeper):
            return self._policy.starts_in(self._books.sequences[keeper])

    monkeypatch.setattr(scheduler, "Room", Searched)
    for seed in range(400):
        draw(random.Random(seed)).live()
    assert min(asked.values()) >= 20, asked
    assert len(asked) == 4
