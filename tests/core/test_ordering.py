"""Policies with one simple order, by rank and in the scheduler."""

import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.ordering import FirstComeFirstServed, ShortestFirst
from fastserve_jax.core.policy import ORACLES, POLICIES, make_policy
from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Finish
from fastserve_jax.errors import ConfigError
from tests.core.driver import Driver, limits, sequence

ROOMY = Limits(max_slots=4, step_tokens=4096)


def test_policies_are_made_by_name():
    for name in POLICIES:
        policy = make_policy(name, ROOMY, CostModel(), lambda request_id: 1.0)
        policy.join(sequence(), 1, 0.0)
    assert not make_policy("fcfs", ROOMY, CostModel()).preempts
    assert make_policy("mlfq", ROOMY, CostModel()).preempts
    with pytest.raises(ConfigError, match=r"'best'.*fcfs, mlfq"):
        make_policy("best", ROOMY, CostModel())


@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_that_knows_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        make_policy(name, ROOMY, CostModel())


def test_fcfs_ranks_by_priority_then_arrival_for_ever():
    policy = FirstComeFirstServed()
    first, second, urgent = sequence(1), sequence(2), sequence(3, priority=-1)
    for seq in (first, second, urgent):
        policy.join(seq, 9, 0.0)
        rank = seq.rank
        policy.charge(seq, 1000, 1000.0)
        assert seq.rank == rank
    assert urgent.rank < first.rank < second.rank
    assert policy.due(1e9, 0) == []


# One slot, a long request that runs, then others of which all but the lengths are alike


def race(name: str, lengths: list[int]) -> Driver:
    """Request 1 has run for four tokens when the others come."""
    driver = Driver(limits(max_slots=1), name)
    driver.submit([1, 2], max_tokens=lengths[0])
    while len(driver.outputs[1]) < 4:
        driver.turn()
    for token, length in enumerate(lengths[1:], 10):
        driver.submit([token, token], max_tokens=length)
    driver.run()
    driver.assert_all_as_alone()
    return driver


def test_sjf_goes_by_the_whole_length_and_displaces_nobody():
    driver = race("sjf-oracle", [30, 9, 3, 6])
    assert list(driver.done) == [1, 3, 4, 2]
    assert driver.scheduler.stats().preemptions == 0


def test_srpt_displaces_who_has_more_left():
    driver = race("srpt-oracle", [30, 9, 3, 6])
    assert list(driver.done) == [3, 4, 2, 1]
    assert driver.scheduler.stats().preemptions == 1


def test_srpt_counts_what_is_left_and_not_what_was():
    driver = race("srpt-oracle", [12, 10, 3])  # 8 left of the first
    assert list(driver.done) == [3, 1, 2]


def test_srpt_displaces_nobody_for_little():
    driver = race("srpt-oracle", [20, 19, 19, 19])
    assert list(driver.done) == [1, 2, 3, 4]
    assert driver.scheduler.stats().preemptions == 0


def test_ranks_compare_though_steps_have_become_longer():
    policy = ShortestFirst(ROOMY, CostModel(), lambda request_id: 20.0 - request_id, left=True)
    first, second = sequence(1), sequence(2)
    policy.join(first, 1, 0.0)
    for _ in range(100):
        policy.step(1.0, 0.0, 0.0)
    policy.join(second, 1, 0.0)  # one token less to come
    assert second.rank < first.rank


def test_shortest_counts_the_prompt_as_work():
    driver = Driver(limits(max_slots=1), "sjf-oracle", cost=CostModel(prefill_token_s=1.0))
    driver.submit([1], max_tokens=1)
    driver.submit(range(20), max_tokens=2)
    driver.submit([2, 3], max_tokens=8)
    driver.run()
    assert driver.device.admitted == [1, 3, 2]


def test_shortest_leaves_priorities_first():
    driver = Driver(limits(max_slots=1), "srpt-oracle")
    driver.submit([1, 2], max_tokens=2, priority=1)
    driver.submit([3, 4], max_tokens=9)
    driver.run()
    assert list(driver.done) == [2, 1]


def test_predictions_come_from_what_ended():
    """Prompts of 20 tokens lead to long outputs, of 2 to short ones."""
    policy = ShortestFirst(ROOMY, CostModel(), None, left=True)
    for turn in range(400):
        seq = sequence(turn, prompt_tokens=20 if turn % 2 else 2)
        policy.join(seq, 1, 0.0)
        seq.tokens += [0] * (90 if turn % 2 else 6)
        seq.finish = Finish.STOP
        policy.finish(seq, 0.0)
    long, short = sequence(1001, prompt_tokens=20), sequence(1002, prompt_tokens=2)
    for seq in (long, short):
        policy.join(seq, 1, 0.0)
    assert short.rank < long.rank
    assert long.rank[2] > 3 * short.rank[2]


# Static batches


@pytest.mark.parametrize("overlap", [0, 1])
def test_run_to_completion_admits_nobody_before_the_batch_is_over(overlap):
    driver = Driver(limits(max_slots=2, step_tokens=16), "run-to-completion", overlap=overlap)
    for max_tokens in (3, 12, 2, 2, 2):
        driver.submit([max_tokens, 7], max_tokens=max_tokens)
    batches = []
    while driver.scheduler.live:
        ran = set(driver.done)
        plan = driver.turn()
        if plan is not None and plan.admissions:
            batches.append([a.request_id for a in plan.admissions])
            assert set().union(*batches[:-1]) <= ran
    assert batches == [[1, 2], [3, 4], [5]]
    driver.assert_all_as_alone()


def test_run_to_completion_lets_a_batch_in_over_several_steps_no_more():
    """What does not fit the token budget of the first step waits for the next batch."""
    driver = Driver(limits(max_slots=4, step_tokens=4), "run-to-completion")
    for i in range(3):
        driver.submit([i, 1, 2], max_tokens=2)
    driver.run()
    assert driver.device.admitted == [1, 2, 3]
    assert [len(plan.admissions) for plan in driver.plans if plan.admissions] == [2, 1]
    driver.assert_all_as_alone()
