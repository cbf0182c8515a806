"""The router's choices: by load, by what was computed where, and never among those it must not."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.core import routing
from fastserve_jax.core.routing import POLICIES, Router


def made(policy="prefix", count=3):
    router = Router(policy, random.Random(1).sample)
    for number in range(count):
        router.add(f"r{number}")
    return router


def chain(text):
    return [text[: i + 1].encode() for i in range(len(text))]


@pytest.mark.parametrize("policy", POLICIES)
def test_work_is_spread(policy):
    router = made(policy, 10)
    given_to = Counter(router.route(chain(f"{n:05}")[4:], 100, 16) for n in range(1000))
    assert len(given_to) == 10
    assert max(given_to.values()) < 130
    assert sum(router.load(replica) for replica in given_to) == 1000 * 100


def test_what_was_computed_somewhere_is_not_computed_elsewhere():
    router = made(count=20)
    first = router.route(chain("abcdef"), 100, 16)
    router.ended(first, 100)
    for number in range(30):
        assert router.route(chain(f"abcdef{number}"), 10, 16) == first
        router.ended(first, 10)


def test_unless_it_is_so_busy_that_another_is_sooner():
    router = made(count=2)
    first = router.route(chain("abcd"), 60, 16)
    other = router.route(chain("abcd"), 60, 16)  # 64 tokens are computed there, 60 are in front
    assert first == other
    assert router.route(chain("abcd"), 60, 16) != first


def test_the_longest_beginning_counts():
    router = made(count=2)
    assert router.route(chain("ab"), 100, 16) != router.route(chain("xy"), 100, 16)
    ab, xy = "r0", "r1"
    if router.route(chain("abcdef"), 0, 16) != ab:
        ab, xy = xy, ab
    assert router.route(chain("abcdxx"), 0, 16) == ab
    assert router.route(chain("xyab"), 0, 16) == xy


def test_more_than_one_replica_may_have_it():
    router = made(count=8)
    homes = {router.route(chain("abcd"), 100, 16) for _ in range(12)}
    assert len(homes) > 2
    for replica in homes:
        for _ in range(12):
            router.ended(replica, 100)
    assert {router.route(chain("abcd"), 0, 16) for _ in range(20)} <= homes


@pytest.mark.parametrize("policy", POLICIES)
def test_not_to_those_it_must_not(policy):
    router = made(policy)
    router.route(chain("ab"), 10, 16)
    for _ in range(20):
        assert router.route(chain("ab"), 1, 16, without=("r0", "r2")) == "r1"
    assert router.route(chain("ab"), 1, 16, without=("r0", "r1", "r2")) is None
    assert Router(policy, random.sample).route(chain("ab"), 1, 16) is None


def test_one_that_is_gone_gets_nothing_and_who_comes_instead_has_nothing():
    router = made(count=2)
    home = router.route(chain("abcd"), 10, 16)
    other = {"r0": "r1", "r1": "r0"}[home]
    router.remove(home)
    assert {router.route(chain("abcd"), 1, 16) for _ in range(9)} == {other}
    router.ended(home, 10)  # late, and of no consequence
    router.add("r2")
    assert router.load("r2") == 0
    router.ended(other, 9)
    assert router.route(chain("abcd"), 1, 16) == other


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(routing, "MOST_BEGINNINGS", 100)
    router = made()
    for number in range(500):
        router.route(chain(f"{number:04}"), 1, 16)
    assert len(router._homes) == 100


@given(
    st.sampled_from(POLICIES),
    st.lists(
        st.tuples(st.integers(0, 5), st.text("ab", max_size=6), st.integers(0, 50)), max_size=60
    ),
)
def test_loads_are_what_was_routed_and_has_not_ended(policy, moves):
    router = made(policy)
    running: list[tuple[str, int]] = []
    there, made_since = ["r0", "r1", "r2"], 1
    for kind, text, tokens in moves:
        if kind < 3:
            replica = router.route(chain(text), tokens, 16)
            running.append((replica, tokens))
        elif kind < 5 and running:
            router.ended(*running.pop(0))
        elif kind == 5:
            gone, fresh = there.pop(0), f"r{len(there) + made_since}"
            made_since += 1
            router.remove(gone)
            router.add(fresh)
            there.append(fresh)
        for replica in there:
            assert router.load(replica) == sum(t for name, t in running if name == replica)
