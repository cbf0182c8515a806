"""A pool of equal KV pages with reference counts. Page numbers only: no arrays, no tokens."""

from __future__ import annotations

from collections.abc import Iterable


class Release:
    """What comes free if several holders let go, worked out before anybody does."""

    def __init__(self, references: list[int], keep: Iterable[int]) -> None:
        self._references = references
        self._dropped = dict.fromkeys(keep, -1)  # one short of free for ever
        self.pages = 0  # that nobody would hold any more

    def add(self, pages: Iterable[int]) -> None:
        """One more holder lets go of `pages`."""
        dropped, references = self._dropped, self._references
        for page in pages:
            count = dropped[page] = dropped.get(page, 0) + 1
            if count == references[page]:
                self.pages += 1


class PagePool:
    """Pages 0..count-1. A page is free, referenced, or at zero in the hands of the prefix index."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one reference."""
        assert count <= len(self._free), "make room first"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, page: int) -> None:
        self._references[page] += 1

    def drop(self, page: int) -> bool:
        """Give up one reference; True when it was the last. The caller keeps or frees the page."""
        assert self._references[page] > 0, f"page {page} has no owner"
        self._references[page] -= 1
        return self._references[page] == 0

    def free_page(self, page: int) -> None:
        assert self._references[page] == 0, f"page {page} is in use"
        self._free.append(page)

    def release(self, keep: Iterable[int] = ()) -> Release:
        """An empty one, in which the pages `keep` never come free."""
        return Release(self._references, keep)

    def check(self, held: dict[int, int], idle: Iterable[int]) -> None:
        """`held` counts each page's holders; `idle` are the index's unreferenced pages."""
        assert {p: n for p, n in enumerate(self._references) if n} == held, "reference counts"
        everything = [*self._free, *idle, *held]
        assert len(everything) == self.count, "a page is lost or has two places"
        assert set(everything) == set(range(self.count)), "a page is lost or has two places"
