"""Skip-join MLFQ: levels, quanta and starvation, and what the scheduler makes of them."""

import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.mlfq import SkipJoinMLFQ
from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Phase
from tests.core.driver import Driver, sequence

ROOMY = Limits(step_tokens=4096)
A_SECOND_A_TOKEN = CostModel([0.0], (1,), prefill_token_s=1.0, decode_row_s=1.0)


def mlfq(limits: Limits = ROOMY, **kwargs) -> SkipJoinMLFQ:
    """One second a token; quanta of 2, 4, 8 and 16 tokens."""
    return SkipJoinMLFQ(limits, A_SECOND_A_TOKEN, **({"quantum_s": 2.0, "levels": 4} | kwargs))


@pytest.mark.parametrize(
    ("uncached_tokens", "level"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (16, 3), (1000, 3)]
)
def test_joins_the_first_level_whose_quantum_covers_the_first_token(uncached_tokens, level):
    policy, seq = mlfq(), sequence()
    policy.join(seq, uncached_tokens, 0.0)
    assert policy.level(seq) == level
    assert seq.rank[0] == level
    assert policy.levels() == tuple(int(i == level) for i in range(4))


def test_the_naive_one_joins_everybody_at_the_first_level():
    policy, seq = mlfq(skip_join=False), sequence()
    policy.join(seq, 1000, 0.0)
    assert policy.level(seq) == 0


def test_the_first_quantum_is_the_shortest_step_unless_told():
    limits = Limits(max_slots=4)
    policy = SkipJoinMLFQ(limits, CostModel([3.0], (1,), 1.0, 0.5), levels=3)
    for uncached_tokens, level in ((1, 1), (4, 1), (5, 2)):  # quanta 3.5, 7 and 14
        seq = sequence(uncached_tokens)
        policy.join(seq, uncached_tokens, 0.0)
        assert policy.level(seq) == level


def test_a_used_up_quantum_demotes_to_the_end_of_the_next_level():
    policy = mlfq()
    seq, other = sequence(1), sequence(2)
    policy.join(seq, 1, 0.0)
    policy.join(other, 3, 0.0)
    policy.charge(seq, 1, 1.9)
    assert policy.level(seq) == 0
    policy.charge(seq, 1, 0.1)
    assert policy.level(seq) == 1
    assert seq.rank > other.rank
    for served_s, level in ((3, 1), (1, 2), (8, 3), (1000, 3)):
        policy.charge(seq, 1, served_s)
        assert policy.level(seq) == level
    policy.finish(seq, 0.0)
    assert policy.levels() == (0, 1, 0, 0)


def test_the_starved_rise_to_the_first_level_in_order_of_waiting():
    policy = mlfq(starve_s=0.3)
    seqs = [sequence(i) for i in range(3)]
    for i, seq in enumerate(seqs):
        policy.join(seq, 9, 0.0)
        policy.wait(seq, 0.1 * i)
    assert policy.due(0.29, 0) == []
    assert policy.due(0.41, 0) == seqs[:2]
    assert [policy.level(seq) for seq in seqs] == [0, 0, 3]
    assert seqs[0].rank < seqs[1].rank < seqs[2].rank


def test_the_promoted_has_a_whole_quantum_of_the_first_level():
    policy, seq = mlfq(starve_s=0.3), sequence()
    policy.join(seq, 9, 0.0)
    policy.charge(seq, 9, 9.0)
    policy.wait(seq, 0.0)
    assert policy.due(1.0, 0) == [seq]
    policy.charge(seq, 1, 1.9)
    assert policy.level(seq) == 0
    policy.charge(seq, 1, 0.1)
    assert policy.level(seq) == 1


def test_only_those_who_still_wait_since_then_have_starved():
    policy = mlfq(starve_s=0.3)
    running, again = sequence(1), sequence(2)
    for seq in (running, again):
        policy.join(seq, 9, 0.0)
        policy.wait(seq, 0.0)
    running.phase = Phase.RUNNING
    policy.wait(again, 0.2)
    assert policy.due(0.35, 0) == []
    assert policy.due(0.5, 0) == [again]


def test_a_crowd_starving_together_rises_over_several_steps():
    policy = mlfq(starve_s=0.3)
    for i in range(150):
        seq = sequence(i)
        policy.join(seq, 9, 0.0)
        policy.wait(seq, 0.0)
    rounds = [len(policy.due(1.0, 0)) for _ in range(4)]
    assert sum(rounds) == 150
    assert max(rounds) < 150


def test_priority_orders_within_a_level_only():
    policy = mlfq()
    low, high, deep = sequence(1), sequence(2, priority=-1), sequence(3, priority=-9)
    policy.join(low, 1, 0.0)
    policy.join(high, 1, 0.0)
    policy.join(deep, 3, 0.0)
    assert high.rank < low.rank < deep.rank


def test_next_start_is_when_those_above_have_sunk_or_when_it_starves():
    """Section 4.2 of the paper, with quanta of 2, 4, 8 and 16 seconds and two slots."""
    policy = mlfq(Limits(max_slots=2, step_tokens=4096), starve_s=9.0)
    seqs = [sequence(i) for i in range(5)]
    for seq, tokens in zip(seqs, (1, 3, 3, 5, 9), strict=True):  # levels 0, 1, 1, 2, 3
        policy.join(seq, tokens, 0.0)
        policy.wait(seq, 1.0)
    policy.due(1.0, 0)
    starts = [policy.starts_in(seq) for seq in seqs]
    assert starts[:4] == [0.0, 2 / 2, 2 / 2, (2 + 4 + 2 * 4) / 2]
    assert starts[4] == 9.0  # and not (14 + 16 + 8) / 2
    policy.due(6.0, 0)
    assert policy.starts_in(seqs[4]) == 4.0


# In the scheduler


def driver(**changes) -> Driver:
    fields = {"page_size": 4, "num_pages": 64, "max_slots": 1, "step_tokens": 16, "max_context": 99}
    limits = Limits(**(fields | changes))
    return Driver(limits, mlfq(limits, starve_s=1e9), step_s=1.0)


def level(d: Driver, request_id: int) -> int:
    return d.scheduler._policy.level(d.scheduler._books.sequences[request_id])


def test_a_short_newcomer_takes_the_slot_of_a_long_one():
    d = driver()
    d.submit(range(12), max_tokens=30)
    for _ in range(6):
        d.turn()
    d.submit([1, 2], max_tokens=1)
    d.until_preempted()
    d.run()
    assert d.device.admitted == [1, 2, 1]
    assert list(d.done) == [2, 1]
    d.assert_all_as_alone()


def test_each_newcomer_has_its_own_slot_made_free():
    d = driver(max_slots=2, step_tokens=32)
    for start in (0, 20):
        d.submit(range(start, start + 12), max_tokens=30)
    d.plan()
    for token in (1, 2):
        d.submit([token], max_tokens=1)
    d.plan()
    assert d.scheduler.stats().preemptions == 2
    d.run()
    assert sorted(d.device.admitted[2:4]) == [3, 4]
    d.assert_all_as_alone()


def test_a_cached_prompt_joins_higher():
    d = driver(max_slots=4)
    d.submit(range(13), max_tokens=1)
    d.run()
    d.submit([*range(12), 50], max_tokens=1)
    d.submit(range(20, 33), max_tokens=1)
    assert [level(d, i) for i in (2, 3)] == [0, 3]
    d.run()


def test_every_step_it_is_in_counts_as_its_service():
    d = driver(max_slots=2)
    d.submit([1], max_tokens=20)
    d.submit([2], max_tokens=20)
    levels = []
    for _ in range(16):
        d.turn()
        levels.append(level(d, 1))
        assert level(d, 2) == levels[-1]
    # One step of a second is committed in every turn but the first.
    assert levels == [0] * 2 + [1] * 4 + [2] * 8 + [3] * 2
    d.run()


def test_recomputed_positions_are_not_charged():
    d = driver(num_pages=24, step_tokens=3)
    fresh = []
    policy = d.scheduler._policy
    charge = policy.charge
    policy.charge = lambda seq, tokens, s: (fresh.append(tokens), charge(seq, tokens, s))
    d.submit(range(13), max_tokens=40)  # level 3, the last
    for i in range(40):
        d.turn()
        if i % 8 == 0:
            d.submit([i, 1], max_tokens=6)
    d.run()
    stats = d.scheduler.stats()
    assert stats.preemptions > 1
    # Each request is charged its own positions and no more, less what the cache gave it.
    assert min(fresh) > 0
    assert sum(fresh) <= 13 + 39 + 5 * (2 + 5)
    assert sum(fresh) == stats.computed_tokens - stats.recomputed_tokens
    d.assert_all_as_alone()


def test_the_starved_run_in_bounded_time():
    limits = driver().scheduler.limits
    d = Driver(limits, mlfq(limits, starve_s=1.0), step_s=1.0)
    d.submit(range(20), max_tokens=8)  # the last level
    for turn in range(400):
        if 1 in d.done:
            break
        d.now += 0.1
        if d.scheduler.stats().waiting < 3:  # newcomers that would always go first
            d.submit([turn % 50, turn % 7], max_tokens=2)
        d.turn()
    assert 1 in d.done
    d.run()
    d.assert_all_as_alone()


def test_without_starvation_newcomers_always_go_first():
    d = driver()
    d.submit(range(20), max_tokens=8)
    for turn in range(400):
        if d.scheduler.stats().waiting < 3:
            d.submit([turn % 50, turn % 7], max_tokens=2)
        d.turn()
    assert 1 not in d.done
    d.run()


def test_a_better_rank_takes_pages_too():
    d = driver(max_slots=2, num_pages=8)
    d.submit(range(20), max_tokens=8)
    d.turn()
    d.turn()
    d.submit(range(30, 42), max_tokens=1, priority=-1)  # the same level
    d.run()
    assert d.device.admitted == [1, 2, 1]
    d.assert_all_as_alone()
