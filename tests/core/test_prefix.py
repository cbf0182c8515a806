"""Pages and the prefix index against plain definitions."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.core.pages import PagePool
from fastserve_jax.core.prefix import PrefixIndex, extend_chain


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
    pages = index.take(2)
    for digest, page in zip(chain, pages, strict=True):
        index.offer(digest, page)
    index.share(index.match(chain))
    index.check(dict.fromkeys(pages, 2))
    index.release(pages)
    index.check(dict.fromkeys(pages, 1))
    index.release(pages)
    assert (index.idle, index.available) == (2, 4)
    index.check({})
    taken = index.take(3)  # the two free ones, and the end of the chain
    assert index.match(chain) == pages[:1]
    index.share(pages[:1])
    index.check(dict.fromkeys([*taken, pages[0]], 1))
    assert index.available == 0


def test_the_second_of_two_equal_pages_stays_private():
    index = PrefixIndex(PagePool(2))
    (digest,) = chain_of(range(4))
    first, second = index.take(2)
    index.offer(digest, first)
    index.offer(digest, second)
    assert index.match([digest]) == [first]
    index.release([second])
    assert index.idle == 0
    index.check({first: 1})


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
    release = pool.release()
    letting_go = holders[:some]
    for pages in letting_go[:1]:
        release.add(pages)
    kept = release.without(keep)
    for pages in letting_go[1:]:
        release.add(pages)
        kept.add(pages)
    left = [sum(page in pages for pages in holders[some:]) for page in range(6)]
    free = {page for page in range(6) if references[page] and not left[page]}
    assert release.pages == len(free)
    assert kept.pages == len(free - set(keep))
