"""Which host pages hold which tokens: the second home of pages that left the device.

Copies stay when they are read back, so what leaves again need not be written again. Nobody owns
one: when all are in use the one unused longest makes room, and whoever wanted it computes it anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class HostIndex:
    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._page_of: OrderedDict[bytes, int] = OrderedDict()  # longest unused first
        self._pinned: set[int] = set()  # of the plan being made: written once, before it is read

    @property
    def used(self) -> int:
        return len(self._page_of)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._page_of

    def find(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def put(self, digest: bytes) -> int | None:
        """The page that is to hold `digest` from now on; None where this plan needs them all."""
        if self._free:
            page = self._free.pop()
        else:
            free = (d for d, page in self._page_of.items() if page not in self._pinned)
            oldest = next(free, None)
            if oldest is None:
                return None
            page = self._page_of.pop(oldest)
        self._page_of[digest] = page
        self._pinned.add(page)
        return page

    def pin(self, pages: Iterable[int]) -> None:
        """They must not be written before `unpin`: this plan reads them."""
        self._pinned.update(pages)

    def unpin(self) -> None:
        self._pinned.clear()

    def touch(self, digest: bytes) -> None:
        """Still wanted."""
        if digest in self._page_of:
            self._page_of.move_to_end(digest)

    def outdate(self, digest: bytes) -> None:
        """Nobody will ask for it again: first to go."""
        if digest in self._page_of:
            self._page_of.move_to_end(digest, last=False)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        pages = [*self._free, *self._page_of.values()]
        assert sorted(pages) == list(range(self.count)), "a host page is lost or has two places"
        assert not self._pinned, "pinned for a plan that is made"
