"""Which full pages hold which tokens, so that equal prefixes are computed once.

A page is named by a SHA-256 over its tokens and everything before them. Knows pages and tokens;
nothing of requests, phases or order.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from .pages import PagePool


def extend_chain(chain: list[bytes], tokens: Sequence[int], page_size: int, salt: str) -> None:
    """Append to `chain` the digests of those full pages of `tokens` that it lacks."""
    parent = chain[-1] if chain else hashlib.sha256(salt.encode()).digest()
    pack = struct.Struct(f"<{page_size}I").pack
    for page in range(len(chain), len(tokens) // page_size):
        of_page = tokens[page * page_size : (page + 1) * page_size]
        parent = hashlib.sha256(parent + pack(*of_page)).digest()
        chain.append(parent)


class PrefixIndex:
    """Digests to pages. Indexed pages that nobody references stay until their room is needed,
    the one unused longest going first."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # unreferenced, longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` could hand out."""
        return self._pool.free + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def match(self, chain: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix of `chain`. Changes nothing."""
        pages: list[int] = []
        for digest in chain:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle_among(self, pages: Iterable[int]) -> int:
        return sum(page in self._idle for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._idle.pop(page, None)
            self._pool.share(page)

    def take(self, count: int) -> list[int]:
        """`count` private pages; forgets the longest unused prefixes where it must."""
        while self._pool.free < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
            self._pool.free_page(page)
        return self._pool.take(count)

    def offer(self, digest: bytes, page: int) -> None:
        """Let others share `page`. Where an equal page is known already, it stays private."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: list[int]) -> None:
        """Drop one reference of each. Later pages age first: none is found without its parent."""
        for page in reversed(pages):
            if self._pool.drop(page):
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._pool.free_page(page)

    def check(self, held: dict[int, int]) -> None:
        """`held` counts each page's holders. Raises AssertionError when books do not balance."""
        self._pool.check(held, self._idle)
        assert {d: p for p, d in self._digest_of.items()} == self._page_of, "two names of a page"
        assert all(page in self._digest_of for page in self._idle), "an idle page has no name"
