"""Random lives: whatever is asked, everybody gets what it would get alone, and nothing is lost."""

import random
from collections import Counter

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastserve_jax.core.scheduler import Limits
from fastserve_jax.core.types import Finish
from tests.core.driver import Driver
from tests.core.lives import COSTS, GUESSES, NAMES, VOCABS, Ask, draw, live, policy
from tests.fakes import VOCAB

asks = st.builds(
    Ask,
    shared=st.sampled_from([0, 0, 5, 9, 16]),
    own=st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple),
    max_tokens=st.integers(0, 14),
    seed=st.integers(0, 2),
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    deadline_s=st.sampled_from([None, None, None, 0.5]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    client=st.sampled_from(["", "a", "b"]),
    session=st.sampled_from(["", "s"]),
)
moves = st.one_of(
    asks,
    asks,
    st.just("turn"),
    st.just("turn"),
    st.just("plan"),
    st.just("commit"),
    st.tuples(st.just("cancel"), st.integers(1, 12)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.1, 1.0])),
)
bounds = st.builds(
    lambda slots, spare, **rest: Limits(max_slots=slots, step_tokens=slots + spare, **rest),
    slots=st.integers(1, 5),
    spare=st.integers(0, 12),
    page_size=st.sampled_from([1, 2, 4]),
    num_pages=st.integers(4, 36),
    host_pages=st.sampled_from([0, 3, 9, 80]),
    max_context=st.just(40),
    max_queue=st.just(8),
    guesses=st.sampled_from(GUESSES),
)
vocabs = st.sampled_from(VOCABS)
policies = st.sampled_from(NAMES)
costs = st.sampled_from(list(COSTS))

calm = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


@calm
@given(bounds, policies, st.integers(0, 1), st.lists(moves, max_size=60), costs, vocabs)
def test_everybody_gets_what_it_gets_alone(limits, name, overlap, script, cost, vocab):
    driver = live(limits, name, overlap, script, cost=cost, vocab=vocab)
    assert driver.done.keys() == driver.requests.keys()
    driver.assert_all_as_alone()


@calm
@given(bounds, policies, st.lists(asks, max_size=12), vocabs)
def test_overlap_changes_no_token(limits, name, script, vocab):
    overlapped, plain = (live(limits, name, overlap, script, vocab=vocab) for overlap in (1, 0))
    assert overlapped.outputs == plain.outputs
    assert overlapped.scored == plain.scored


@calm
@given(bounds, policies, st.lists(moves, max_size=40), costs, vocabs)
def test_the_same_life_is_the_same_trace(limits, name, script, cost, vocab):
    once, again = (live(limits, name, 1, script, cost=cost, vocab=vocab) for _ in range(2))
    assert once.plans == again.plans


@calm
@given(
    bounds,
    policies,
    st.lists(moves, max_size=40),
    st.sets(st.tuples(st.integers(1, 8), st.integers(0, 6)), max_size=4),
    vocabs,
)
def test_bad_numbers_end_only_their_own_request(limits, name, script, nan, vocab):
    driver = live(limits, name, 1, script, nan, vocab=vocab)
    for request_id, done in driver.done.items():
        if done.reason is Finish.ERROR:
            assert (request_id, done.output_tokens) in nan


@calm
@given(bounds, policies, st.lists(asks, min_size=4, max_size=16), costs)
@example(
    Limits(page_size=4, num_pages=8, max_slots=2, step_tokens=6, max_context=40),
    "eager",
    [Ask(0, (1, 2, 3, 4, 5, 6), 14)] * 8,
    "cheap",
)
@example(
    Limits(page_size=4, num_pages=8, host_pages=80, max_slots=2, step_tokens=6, max_context=40),
    "adaptive",
    [Ask(0, (i, 2, 3, 4, 5, 6), 14) for i in range(8)],
    "slow",
)
def test_nobody_starves(limits, name, script, cost):
    """Turns stay within a small multiple of the work, however small the pool."""
    driver = Driver(limits, policy(name, limits), cost=COSTS[cost].copy())
    for ask in script:
        ask.submit(driver)
    tokens = sum(len(r.prompt) + r.sampling.max_tokens for r in driver.requests.values())
    for turn in range(60 + 12 * tokens):
        if not driver.scheduler.live:
            break
        driver.now += 0.01 * (turn % 3)
        driver.turn()
    assert not driver.scheduler.live, driver.scheduler.stats()


def test_in_these_lives_everything_happens():
    """The same three hundred every time: if nothing were ever swapped, all would pass."""
    seen = Counter()
    for seed in range(300):
        driver = draw(random.Random(seed)).live()
        stats = driver.scheduler.stats()
        for name in ("preemptions", "pages_out", "pages_in", "host_hit_tokens", "accepted_tokens"):
            seen[name] += getattr(stats, name)
        seen["recomputed_tokens"] += stats.recomputed_tokens
        seen["cached_tokens"] += sum(started.cached_tokens for started in driver.started.values())
        seen["full_hosts"] += 0 < stats.host_pages_used == stats.host_pages_total
        # What came in for whom was not in the plan yet.
        seen["fetched_ahead"] += sum(bool(p.swap_in) and not p.admissions for p in driver.plans)
        seen["written_behind"] += sum(bool(p.swap_out) and not p.admissions for p in driver.plans)
        seen["copies_alone"] += sum(not plan.work for plan in driver.plans)
        seen.update(done.reason for done in driver.done.values())
        wrong = stats.guessed_tokens - stats.accepted_tokens
        seen["wrong_tokens"] += wrong
        known = stats.computed_tokens - stats.recomputed_tokens - wrong
        assert known <= sum(len(r.prompt) + r.sampling.max_tokens for r in driver.requests.values())
    assert set(Finish) <= seen.keys()
    counts = {name: count for name, count in seen.items() if isinstance(name, str)}
    assert len(counts) == 12
    assert min(counts.values()) > 0, counts
