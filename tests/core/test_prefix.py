"""Pages and the prefix index against plain definitions."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.core.pages import PagePool
from fastserve_jax.core.prefix import PrefixIndex, extend_chain, root_digest, tail_digest
from fastserve_jax.core.types import Adapter
from tests.core.driver import known


def take(index, count):
    """None of whose keepers may lose anything."""
    return index.take(count, lambda keepers: pytest.fail(f"took from {set(keepers)}"))


def chain_of(tokens, page_size=4, salt=""):
    chain = []
    extend_chain(chain, tokens, page_size, salt)
    return chain


def test_digest_is_the_chain_of_sha256():
    root = hashlib.sha256(b"salt").digest()
    first = hashlib.sha256(root + struct.pack("<2I", 1, 2**32 - 1)).digest()
    second = hashlib.sha256(first + struct.pack("<2I", 3, 4)).digest()
    assert chain_of([1, 2**32 - 1, 3, 4, 5], 2, "salt") == [first, second]


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 20), st.sampled_from(["", "a"]))
def test_chains_grow_piece_by_piece_and_name_the_whole_prefix(tokens, cut, salt):
    chain = []
    extend_chain(chain, tokens[:cut], 3, salt)
    extend_chain(chain, tokens, 3, salt)
    assert chain == chain_of(tokens, 3, salt)
    assert len(chain) == len(tokens) // 3
    if len(tokens) >= 6:
        other = [tokens[0] + 1, *tokens[1:]]
        assert not set(chain) & set(chain_of(other, 3, salt))


def test_index_shares_keeps_and_forgets():
    pool = PagePool(4)
    index = PrefixIndex(pool)
    chain = chain_of(range(8))
    pages = take(index, 2)
    for digest, page in zip(chain, pages, strict=True):
        index.offer(digest, page)
    index.share(known(index, chain))
    index.check(dict.fromkeys(pages, 2))
    index.release(pages)
    index.check(dict.fromkeys(pages, 1))
    index.release(pages)
    assert (index.idle, index.available) == (2, 4)
    index.check({})
    taken = take(index, 3)  # the two free ones, and the end of the chain
    assert known(index, chain) == pages[:1]
    index.share(pages[:1])
    index.check(dict.fromkeys([*taken, pages[0]], 1))
    assert index.available == 0


def test_the_second_of_two_equal_pages_stays_private():
    index = PrefixIndex(PagePool(2))
    (digest,) = chain_of(range(4))
    first, second = take(index, 2)
    index.offer(digest, first)
    index.offer(digest, second)
    assert known(index, [digest]) == [first]
    index.release([second])
    assert index.idle == 0
    index.check({first: 1})


def test_a_keeper_loses_its_last_pages_first_and_after_everybodys():
    index = PrefixIndex(PagePool(7))
    chains = {keeper: chain_of([keeper] * 8) for keeper in (1, 2, 3)}
    for keeper, chain in chains.items():
        pages = take(index, 2)
        for digest, page in zip(chain, pages, strict=True):
            index.offer(digest, page)
        index.release(pages, keeper=None if keeper == 3 else keeper)
    index.check({})
    assert (index.available, index.disposable, index.idle) == (7, 3, 6)
    assert index.keepers == {1, 2}
    asked = []

    def last(keepers):
        asked.append(set(keepers))
        return max(keepers)

    held = dict.fromkeys(index.take(6, last), 1)
    assert asked == [{1, 2}, {1}]  # once for all it gives, never of one that keeps nothing more
    assert known(index, chains[1]) == index.kept(1)
    assert not known(index, chains[2]) + known(index, chains[3])
    index.check(held)
    index.unkeep(1)
    assert (index.disposable, index.keepers) == (1, set())
    index.check(held)


def test_what_is_shared_again_is_kept_for_nobody_until_given_back():
    index = PrefixIndex(PagePool(4))
    chain = chain_of(range(12))
    pages = take(index, 3)
    for digest, page in zip(chain, pages, strict=True):
        index.offer(digest, page)
    index.release(pages, keeper=1)
    assert index.kept(1) == pages[::-1]
    index.share(pages[:2])
    assert index.kept(1) == pages[2:]
    index.release(pages[:2], keeper=2)
    assert (index.kept(1), index.kept(2)) == (pages[2:], pages[1::-1])
    index.check({})


def test_a_page_without_its_name_is_free_when_it_is_given_back():
    index = PrefixIndex(PagePool(2))
    (digest,) = chain_of(range(4))
    (page,) = take(index, 1)
    index.offer(digest, page)
    assert index.find(digest) == page
    index.withdraw(page)
    assert index.find(digest) is None
    index.release([page], keeper=1)
    assert (index.idle, index.keepers) == (0, set())
    index.check({})


def test_who_loses_its_name_is_told_of():
    gone = []
    index = PrefixIndex(PagePool(2), lambda *what: gone.append(what))
    chain = chain_of(range(8))
    pages = take(index, 2)
    for digest, page in zip(chain, pages, strict=True):
        index.offer(digest, page)
    index.release(pages[1:])
    index.release(pages[:1], keeper=7)
    take(index, 1)
    index.take(1, max)
    assert gone == [(pages[1], chain[1], None), (pages[0], chain[0], 7)]


@given(st.lists(st.integers(0, 3), max_size=7))
def test_a_tail_is_named_like_no_page_and_no_other_tail(tokens):
    """Whatever is before it, as long as digests differ."""
    root = root_digest("")
    name = tail_digest(root, tokens)
    assert name not in chain_of(tokens, max(len(tokens), 1))
    assert name != tail_digest(root, [*tokens, 0])
    assert name != tail_digest(chain_of(range(4))[0], tokens)


def test_pool_refuses_to_be_misused():
    pool = PagePool(2)
    (page,) = pool.take(1)
    with pytest.raises(AssertionError):
        pool.take(2)
    with pytest.raises(AssertionError):
        pool.free_page(page)
    assert pool.drop(page)
    with pytest.raises(AssertionError):
        pool.drop(page)
    with pytest.raises(AssertionError):
        pool.check({}, [])  # neither free nor idle nor held


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6, unique=True), max_size=6),
    st.integers(0, 6),
    st.lists(st.integers(0, 5), unique=True),
)
def test_release_foretells_what_comes_free(holders, some, keep):
    pool = PagePool(6)
    pool.take(6)  # one reference that stays, then is given up
    for pages in holders:
        for page in pages:
            pool.share(page)
    for page in range(6):
        pool.drop(page)
    references = [sum(page in pages for pages in holders) for page in range(6)]
    release, kept = pool.release(), pool.release(keep)
    for pages in holders[:some]:
        release.add(pages)
        kept.add(pages)
    left = [sum(page in pages for pages in holders[some:]) for page in range(6)]
    free = {page for page in range(6) if references[page] and not left[page]}
    assert release.pages == len(free)
    assert kept.pages == len(free - set(keep))


def test_roots_of_adapters_are_nobody_elses():
    adapters = [None, Adapter(1, 1), Adapter(1, 2), Adapter(2, 3)]
    roots = {root_digest(salt, adapter) for salt in ("", "a") for adapter in adapters}
    assert len(roots) == 8
    assert root_digest("a", Adapter(1, 2)) == root_digest("a", Adapter(2, 2)), "by serial alone"
