"""Ranks, levels and service of the policies, and what the scheduler makes of them."""

import pytest

from fastserve_jax.core.policy import FirstComeFirstServed, SkipJoinMLFQ, make_policy
from fastserve_jax.core.scheduler import Limits
from fastserve_jax.core.sequence import Sequence
from fastserve_jax.core.types import Phase, Request, Sampling
from fastserve_jax.core.waiting import WaitingQueue
from fastserve_jax.errors import ConfigError
from tests.core.driver import Driver


def sequence(request_id: int = 1, prompt_tokens: int = 1, priority: int = 0) -> Sequence:
    request = Request(request_id, (0,) * prompt_tokens, Sampling(max_tokens=99), priority)
    return Sequence(request, list(request.prompt))


def mlfq(**kwargs) -> SkipJoinMLFQ:
    """One second a token; quanta of 2, 4, 8 and 16 tokens."""
    return SkipJoinMLFQ(float, quantum_s=2.0, levels=4, **kwargs)


@pytest.mark.parametrize(
    ("uncached_tokens", "level"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (16, 3), (1000, 3)]
)
def test_joins_the_first_level_whose_quantum_covers_the_first_token(uncached_tokens, level):
    seq = sequence()
    mlfq().join(seq, uncached_tokens)
    assert seq.level == level
    assert seq.rank[0] == level


def test_a_used_up_quantum_demotes_to_the_end_of_the_next_level():
    policy = mlfq()
    seq, other = sequence(1), sequence(2, priority=0)
    policy.join(seq, 1)
    policy.join(other, 3)
    policy.charge(seq, 1)
    assert seq.level == 0
    policy.charge(seq, 1)
    assert seq.level == 1
    assert seq.rank > other.rank
    for served, level in ((3, 1), (1, 2), (8, 3), (1000, 3)):
        policy.charge(seq, served)
        assert seq.level == level


def test_the_starved_rise_to_the_first_level_in_order_of_waiting():
    policy = mlfq(starve_s=0.3)
    seqs = [sequence(i, prompt_tokens=9) for i in range(3)]
    for i, seq in enumerate(seqs):
        policy.join(seq, 9)
        policy.wait(seq, 0.1 * i)
    assert policy.due(0.29) == []
    assert policy.due(0.41) == seqs[:2]
    assert [seq.level for seq in seqs] == [0, 0, 3]
    assert seqs[0].rank < seqs[1].rank < seqs[2].rank


def test_only_those_who_still_wait_since_then_have_starved():
    policy = mlfq(starve_s=0.3)
    running, again = sequence(1), sequence(2)
    for seq in (running, again):
        policy.join(seq, 9)
        policy.wait(seq, 0.0)
    running.phase = Phase.RUNNING
    policy.wait(again, 0.2)
    assert policy.due(0.35) == []
    assert policy.due(0.5) == [again]


def test_a_crowd_starving_together_rises_over_several_steps():
    policy = mlfq(starve_s=0.3)
    for i in range(150):
        seq = sequence(i)
        policy.join(seq, 9)
        policy.wait(seq, 0.0)
    rounds = [len(policy.due(1.0)) for _ in range(4)]
    assert sum(rounds) == 150
    assert max(rounds) < 150


def test_priority_orders_within_a_level_only():
    policy = mlfq()
    low, high, deep = sequence(1), sequence(2, priority=-1), sequence(3, priority=-9)
    policy.join(low, 1)
    policy.join(high, 1)
    policy.join(deep, 3)
    assert high.rank < low.rank < deep.rank


def test_fcfs_ranks_by_priority_then_arrival_for_ever():
    policy = FirstComeFirstServed()
    first, second, urgent = sequence(1), sequence(2), sequence(3, priority=-1)
    for seq in (first, second, urgent):
        policy.join(seq, 9)
        rank = seq.rank
        policy.charge(seq, 1000)
        assert seq.rank == rank
    assert urgent.rank < first.rank < second.rank
    assert policy.due(1e9) == []


def test_policies_are_made_by_name():
    assert not make_policy("fcfs").preempts
    assert make_policy("mlfq").preempts
    with pytest.raises(ConfigError, match=r"'best'.*fcfs, mlfq"):
        make_policy("best")


# In the scheduler


def driver(**changes) -> Driver:
    fields = {"page_size": 4, "num_pages": 64, "max_slots": 1, "step_tokens": 16, "max_context": 99}
    return Driver(Limits(**(fields | changes)), mlfq(starve_s=1e9))


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
    assert [d.scheduler._books.sequences[i].level for i in (2, 3)] == [0, 3]
    d.run()


def test_recomputed_positions_are_not_charged():
    limits = driver(num_pages=24, step_tokens=3).scheduler.limits
    fresh = []
    policy = mlfq(starve_s=1e9)
    charge = policy.charge
    policy.charge = lambda seq, tokens: (fresh.append(tokens), charge(seq, tokens))
    d = Driver(limits, policy)
    d.submit(range(13), max_tokens=40)  # level 3, the last
    for i in range(40):
        d.turn()
        if i % 8 == 0:
            d.submit([i, 1], max_tokens=6)
    d.run()
    assert d.scheduler.stats().preemptions > 1
    # Each request is charged its own positions and no more, less what the cache gave it.
    assert min(fresh) > 0
    assert sum(fresh) <= 13 + 39 + 5 * (2 + 5)
    d.assert_all_as_alone()


def test_the_starved_run_in_bounded_time():
    d = Driver(driver().scheduler.limits, mlfq(starve_s=1.0))
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


def test_a_better_rank_takes_pages_too():
    d = driver(max_slots=2, num_pages=8)
    d.submit(range(20), max_tokens=8)
    d.turn()
    d.turn()
    d.submit(range(30, 42), max_tokens=1, priority=-1)  # the same level
    d.run()
    assert d.device.admitted == [1, 2, 1]
    d.assert_all_as_alone()


# The queue


def test_queue_follows_ranks_as_they_change():
    queue = WaitingQueue()
    seqs = [sequence(i) for i in range(5)]
    for seq, turn in zip(seqs, (3, 1, 4, 2, 5), strict=True):
        seq.rank = (1, 0, turn)
        queue.push(seq)
    seqs[4].rank = (0, 0, 9)
    queue.push(seqs[4])
    queue.discard(seqs[1])
    assert len(queue) == 4
    assert [queue.pop().id for _ in range(4)] == [4, 3, 0, 2]
    assert queue.peek() is None


def test_queue_passes_over_ranks_of_the_past():
    queue = WaitingQueue()
    seq, other = sequence(1), sequence(2)
    for rank in ((1, 0, 1), (0, 0, 2)):
        seq.rank = rank
        queue.push(seq)
    assert queue.pop() is seq
    seq.rank, other.rank = (2, 0, 3), (1, 0, 4)
    queue.push(seq)
    queue.push(other)
    assert [queue.pop().id, queue.pop().id] == [2, 1]


def test_queue_sweeps_stale_entries_out():
    queue = WaitingQueue()
    seq = sequence()
    for turn in range(10_000):
        seq.rank = (1, 0, -turn)
        queue.push(seq)
    assert len(queue._heap) < 100
    assert queue.pop() is seq
    assert queue.peek() is None
