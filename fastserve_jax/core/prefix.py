"""Which device pages hold which tokens, so that nothing is computed twice while it lasts.

A page is named by a SHA-256 over its tokens and everything before them. Unreferenced pages that
have a name stay until their room is needed: first those nobody in particular will want, longest
unused first; then those kept for a waiting sequence. Knows pages, names and opaque keepers.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, KeysView, Sequence
from itertools import islice

from .pages import PagePool
from .types import Adapter

# A page is about to lose its name and its content; whether somebody waits who will want it.
Evicted = Callable[[int, bytes, int | None], None]


def root_digest(salt: str, adapter: Adapter | None = None) -> bytes:
    digest = hashlib.sha256(salt.encode()).digest()
    if adapter is None:
        return digest
    # Begins as no text does: there is no salt that leads to an adapter's pages.
    return hashlib.sha256(b"\xff" + struct.pack("<Q", adapter.serial) + digest).digest()


def extend_chain(
    chain: list[bytes],
    tokens: Sequence[int],
    page_size: int,
    salt: str,
    end: int | None = None,
    adapter: Adapter | None = None,
) -> None:
    """Append to `chain` the digests of those full pages of `tokens`, up to `end`, that it lacks."""
    parent = chain[-1] if chain else root_digest(salt, adapter)
    pack = struct.Struct(f"<{page_size}I").pack
    for page in range(len(chain), (len(tokens) if end is None else end) // page_size):
        of_page = tokens[page * page_size : (page + 1) * page_size]
        parent = hashlib.sha256(parent + pack(*of_page)).digest()
        chain.append(parent)


def tail_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a last page that `tokens` do not fill."""
    return hashlib.sha256(parent + struct.pack(f"<{len(tokens)}I", *tokens) + b"tail").digest()


class PrefixIndex:
    def __init__(self, pool: PagePool, evicted: Evicted = lambda *what: None) -> None:
        self._pool = pool
        self._evicted = evicted
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody's, longest unused first
        self._kept: dict[int, dict[int, None]] = {}  # by keeper: unreferenced, last page first
        self._keeper_of: dict[int, int] = {}

    @property
    def available(self) -> int:
        """Pages that `take` could hand out."""
        return self._pool.free + len(self._idle) + len(self._keeper_of)

    @property
    def disposable(self) -> int:
        """Of them, those that no waiting sequence would miss."""
        return self._pool.free + len(self._idle)

    @property
    def idle(self) -> int:
        """Unreferenced pages with a name."""
        return len(self._idle) + len(self._keeper_of)

    @property
    def keepers(self) -> KeysView[int]:
        return self._kept.keys()

    def kept(self, keeper: int) -> list[int]:
        """Its unreferenced pages, last one first."""
        return list(self._kept.get(keeper, ()))

    def find(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def digest(self, page: int) -> bytes:
        return self._digest_of[page]

    def name(self, page: int) -> bytes | None:
        """The digest that it is found by, if it is."""
        return self._digest_of.get(page)

    def idle_among(self, pages: Iterable[int]) -> int:
        return sum(page in self._idle or page in self._keeper_of for page in pages)

    def others_among(self, pages: Iterable[int], keeper: int) -> int:
        """Of unreferenced `pages`, those not kept for `keeper`."""
        idle, keeper_of = self._idle, self._keeper_of
        return sum(page in idle or keeper_of.get(page, keeper) != keeper for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each."""
        idle, keeper_of = self._idle, self._keeper_of
        for page in pages:
            if page in keeper_of:
                self._unkeep_page(page)
            else:
                idle.pop(page, None)
            self._pool.share(page)

    def take(self, count: int, last: Callable[[KeysView[int]], int]) -> list[int]:
        """`count` private pages; where it must, makes room: `last` names, among keepers, the one
        that can do without its pages for longest, which loses its last pages first."""
        while (short := count - self._pool.free) > 0:
            keeper: int | None = None
            if self._idle:
                pages = list(islice(self._idle, short))
                for page in pages:
                    del self._idle[page]
            else:
                keeper = last(self._kept.keys())
                pages = list(islice(self._kept[keeper], short))
                for page in pages:
                    self._unkeep_page(page)
            for page in pages:
                digest = self._digest_of.pop(page)
                del self._page_of[digest]
                self._evicted(page, digest, keeper)
                self._pool.free_page(page)
        return self._pool.take(count)

    def offer(self, digest: bytes, page: int) -> None:
        """Let others share `page`. Where an equal page is known already, it stays private."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def withdraw(self, page: int) -> None:
        """`page` is about to be written further: it has no name any more."""
        del self._page_of[self._digest_of.pop(page)]

    def release(self, pages: list[int], keeper: int | None = None) -> None:
        """Drop one reference of each; what has a name is kept for `keeper`. Later pages go first
        when room is needed: none is found without its parent."""
        for page in reversed(pages):
            if self._pool.drop(page):
                if page not in self._digest_of:
                    self._pool.free_page(page)
                elif keeper is None:
                    self._idle[page] = None
                else:
                    self._kept.setdefault(keeper, {})[page] = None
                    self._keeper_of[page] = keeper

    def unkeep(self, keeper: int) -> None:
        """`keeper` needs its pages no more than anybody else."""
        for page in self._kept.pop(keeper, ()):
            del self._keeper_of[page]
            self._idle[page] = None

    def _unkeep_page(self, page: int) -> None:
        keeper = self._keeper_of.pop(page, None)
        if keeper is not None:
            pages = self._kept[keeper]
            del pages[page]
            if not pages:
                del self._kept[keeper]

    def check(self, held: dict[int, int]) -> None:
        """`held` counts each page's holders. Raises AssertionError when books do not balance."""
        self._pool.check(held, [*self._idle, *self._keeper_of])
        assert {d: p for p, d in self._digest_of.items()} == self._page_of, "two names of a page"
        assert all(page in self._digest_of for page in self._idle), "an idle page has no name"
        assert all(page in self._digest_of for page in self._keeper_of), "a kept page has no name"
        kept = {page: keeper for keeper, pages in self._kept.items() for page in pages}
        assert kept == self._keeper_of, "keepers"
        assert all(self._kept.values()), "a keeper of nothing"
