"""The scheduler's decisions, one by one, on a device that checks every read."""

import pytest

from fastserve_jax.core.types import Finish, Request, Sampled, Sampling, StepResult
from fastserve_jax.errors import ConfigError, InvalidRequest, Overloaded
from tests.core.driver import Driver, limits, pressed
from tests.fakes import alone

SMALL = limits()


# Steps


def test_prompt_is_chunked_to_the_token_budget():
    driver = Driver(SMALL)
    driver.submit(range(20), max_tokens=2)
    assert driver.work(driver.plan()) == [(1, 0, 8)]
    assert driver.work(driver.plan()) == [(1, 8, 8)]
    assert not driver.plans[1].work[0].samples
    driver.commit()
    assert driver.work(driver.plan()) == [(1, 16, 4)]
    assert driver.plans[2].work[0].samples
    driver.run()
    driver.assert_all_as_alone()


def test_decodes_are_never_stalled_by_a_long_prompt():
    driver = Driver(SMALL, overlap=0)
    driver.submit([1, 2], max_tokens=12)
    driver.turn()
    driver.submit(range(30), max_tokens=1)
    for _ in range(4):
        rows = driver.work(driver.turn())
        assert rows[0][0] == 1
        assert rows[0][2] == 1
        assert rows[1][2] == 7  # what the decode leaves of the budget
    driver.run()
    driver.assert_all_as_alone()


def test_two_prompts_share_one_step():
    driver = Driver(SMALL)
    driver.submit([1, 2, 3])
    driver.submit([4, 5, 6, 7, 8, 9])
    assert driver.work(driver.plan()) == [(1, 0, 3), (2, 0, 5)]
    assert len(driver.plans[0].admissions) == 2


def test_rows_of_one_token_come_first():
    driver = Driver(SMALL)
    driver.submit([1, 2, 3])
    driver.submit([4])
    assert driver.work(driver.plan()) == [(2, 0, 1), (1, 0, 3)]


def test_a_token_in_flight_is_run_without_being_known():
    driver = Driver(SMALL)
    driver.submit([1, 2, 3], max_tokens=3)
    assert driver.work(driver.plan()) == [(1, 0, 3)]
    assert driver.work(driver.plan()) == [(1, 3, 1)]
    assert driver.outputs[1] == []


def test_nothing_is_planned_beyond_max_tokens():
    driver = Driver(SMALL)
    driver.submit([1, 2, 3], max_tokens=2)
    driver.plan()
    last = driver.plan()
    driver.commit()
    assert last is not None
    assert last.work[0].samples
    assert driver.plan() is None
    driver.commit()
    assert driver.done[1].reason is Finish.LENGTH
    assert driver.device.positions_run == 4  # the last token is never run


def test_at_most_two_plans_in_flight_and_committed_in_order():
    driver = Driver(SMALL)
    driver.submit([1, 2, 3], max_tokens=9)
    driver.plan()
    driver.plan()
    with pytest.raises(AssertionError, match="commit the oldest"):
        driver.plan()
    plan, result = driver.in_flight.pop()
    with pytest.raises(AssertionError, match="in order"):
        driver.scheduler.commit(plan, result, 0.0, 0.0)


def test_page_table_travels_as_a_delta():
    driver = Driver(SMALL, overlap=0)
    driver.submit(range(6), max_tokens=5)
    driver.run()
    deltas = [(w.first_page, len(w.pages)) for plan in driver.plans for w in plan.work]
    assert deltas == [(0, 2), (2, 0), (2, 0), (2, 1), (3, 0)]


def test_zero_max_tokens_runs_the_prompt_and_ends():
    driver = Driver(SMALL)
    driver.submit(range(10), max_tokens=0, prompt_logprobs=0)
    driver.run()
    assert driver.done[1].reason is Finish.LENGTH
    assert driver.done[1].output_tokens == 0
    driver.assert_all_as_alone()


def test_slots_bound_the_rows():
    driver = Driver(limits(max_slots=2))
    for _ in range(5):
        driver.submit([1, 2], max_tokens=3)
    assert len(driver.work(driver.plan())) == 2
    assert driver.scheduler.stats().waiting == 3
    driver.run()
    driver.assert_all_as_alone()


# Endings


def test_stop_while_the_next_step_is_in_flight_discards_it():
    prompt = (1, 2, 3)
    first = alone(Request(1, prompt, Sampling(max_tokens=1)))[0][0]
    driver = Driver(SMALL)
    driver.submit(prompt, max_tokens=10, stop_ids=[first])
    driver.plan()
    driver.plan()
    driver.commit()
    assert driver.done[1].reason is Finish.STOP
    stats = driver.scheduler.stats()
    assert (stats.running, stats.ending, stats.pages_used) == (0, 1, 0)  # given back at once
    assert driver.plan() is None
    driver.commit()
    assert driver.outputs[1] == [first]
    assert driver.scheduler.live == 0


def test_slot_and_pages_are_reused_while_their_last_step_is_in_flight():
    first = alone(Request(1, (1, 2, 3), Sampling(max_tokens=1)))[0][0]
    driver = Driver(limits(max_slots=1, num_pages=2))
    driver.submit([1, 2, 3], max_tokens=6, stop_ids=[first])
    driver.submit([4, 5, 6, 7, 8])
    driver.plan()
    last = driver.plan()
    driver.commit()
    plan = driver.plan()
    assert driver.work(last) == [(1, 3, 1)]
    assert driver.work(plan) == [(2, 0, 5)]
    assert plan.work[0].slot == last.work[0].slot
    assert plan.step == last.step + 1
    assert len(driver.in_flight) == 2
    assert set(plan.work[0].pages) == {0, 1}  # all there are
    driver.run()
    driver.assert_all_as_alone()


def test_numbers_that_are_not_finite_end_that_request_alone():
    driver = Driver(SMALL, nan=[(1, 1)])
    driver.submit([1, 2, 3], max_tokens=8)
    driver.submit([4, 5], max_tokens=8)
    driver.run()
    assert driver.done[1].reason is Finish.ERROR
    assert driver.done[2].reason is Finish.LENGTH
    driver.assert_all_as_alone()


@pytest.mark.parametrize("plans", [0, 1, 2])
def test_cancel_with_so_many_plans_in_flight(plans):
    driver = Driver(SMALL)
    driver.submit(range(12), max_tokens=8)
    for _ in range(plans):
        driver.plan()
    driver.cancel(1)
    driver.cancel(1)
    assert driver.done[1].reason is Finish.CANCELLED
    assert driver.scheduler.live == (plans > 0)
    if plans < 2:
        assert driver.plan() is None
    assert driver.scheduler.stats().pages_used == 0
    while driver.in_flight:
        assert driver.scheduler.stats().ending == 1
        driver.commit()
    assert driver.scheduler.live == 0
    assert driver.outputs[1] == []


def test_a_newcomer_in_the_place_of_one_cancelled_twice_in_flight():
    driver = Driver(limits(max_slots=1, num_pages=4))
    driver.submit(range(12), max_tokens=4)
    driver.plan()
    driver.plan()
    driver.cancel(1)
    driver.commit()
    driver.submit(range(30, 42), max_tokens=4)
    assert driver.work(driver.plan()) == [(2, 0, 8)]
    driver.run()
    driver.assert_all_as_alone()


def test_cancel_of_a_preempted_sequence_whose_token_is_in_flight():
    driver = pressed()
    driver.until_preempted()
    assert driver.scheduler.stats().ending == 1
    driver.cancel(2)
    driver.run()
    assert driver.done[2].reason is Finish.CANCELLED
    driver.assert_all_as_alone()


def test_cancel_of_strangers_is_ignored():
    driver = Driver(SMALL)
    driver.cancel(99)
    driver.submit([1], max_tokens=1)
    driver.run()
    driver.cancel(1)
    assert driver.done[1].reason is Finish.LENGTH


def test_deadlines_end_waiting_and_running_requests():
    driver = Driver(limits(max_slots=1))
    driver.submit([1, 2], max_tokens=9, deadline=1.0)
    driver.submit([3, 4], max_tokens=9, deadline=0.5)
    driver.submit([5, 6], max_tokens=2)
    assert driver.scheduler.next_deadline() == 0.5
    driver.turn()
    driver.now = 0.5
    driver.expire()
    assert driver.done[2].reason is Finish.DEADLINE
    assert 1 not in driver.done
    driver.now = 1.5
    driver.expire()
    assert driver.done[1].reason is Finish.DEADLINE
    assert driver.scheduler.next_deadline() is None
    driver.run()
    driver.assert_all_as_alone()


def test_deadline_of_a_finished_request_is_forgotten():
    driver = Driver(SMALL)
    driver.submit([1, 2], max_tokens=1, deadline=1.0)
    driver.run()
    assert driver.scheduler.next_deadline() is None
    driver.now = 2.0
    driver.expire()
    assert driver.done[1].reason is Finish.LENGTH


# Refusals


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "says"),
    [
        ([], 4, "empty"),
        (range(60), 5, "60 prompt tokens and max_tokens 5 make 65.* 64"),
        (range(40), 10, "need 13 KV pages and there are 12"),
    ],
)
def test_impossible_requests_are_refused_with_numbers(prompt, max_tokens, says):
    driver = Driver(limits(num_pages=12))
    with pytest.raises(InvalidRequest, match=says):
        driver.submit(prompt, max_tokens)
    assert driver.scheduler.live == 0
    assert driver.scheduler.stats().rejected == 1


def test_the_largest_request_that_fits_the_pool_is_served():
    driver = Driver(limits(num_pages=12))
    driver.submit(range(40), max_tokens=9)  # 48 positions: the last token needs no page
    driver.run()
    driver.assert_all_as_alone()


@pytest.mark.parametrize("bound", [{"max_queue": 2}, {"max_live": 3}])
def test_overload_is_refused_and_changes_nothing(bound):
    driver = Driver(limits(max_slots=1, **bound))
    driver.submit([1], max_tokens=5)
    driver.turn()
    driver.submit([2])
    driver.submit([3])
    before = driver.scheduler.stats()
    with pytest.raises(Overloaded) as refusal:
        driver.submit([4])
    assert refusal.value.retry_after_s
    after = driver.scheduler.stats()
    assert (after.waiting, after.submitted) == (before.waiting, before.submitted)
    driver.run()
    driver.submit([4])
    driver.run()
    driver.assert_all_as_alone()


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"max_queue": -1}, {"step_tokens": 3}])
def test_limits_under_which_nothing_runs_are_refused(wrong):
    with pytest.raises(ConfigError) as refusal:
        limits(**wrong)
    assert refusal.value.param in wrong


# Books


def test_stats_count_and_never_fall():
    driver = pressed()
    last = driver.scheduler.stats()
    while driver.scheduler.live:
        driver.turn()
        stats = driver.scheduler.stats()
        for counter in ("preemptions", "steps", "output_tokens", "computed_tokens", "busy_s"):
            assert getattr(stats, counter) >= getattr(last, counter)
        last = stats
    assert last.output_tokens == 40
    assert last.computed_tokens <= driver.device.positions_run
    assert (last.submitted, last.finished, last.pages_total) == (2, 2, 8)
    assert last.prefix_hit_tokens > 0


def test_check_finds_a_lost_page():
    driver = Driver(SMALL)
    driver.submit(range(6))
    driver.turn()
    driver.scheduler._books.sequences[1].pages.pop()
    with pytest.raises(AssertionError):
        driver.scheduler.check()


def test_a_result_without_the_sampled_token_is_our_bug():
    driver = Driver(SMALL)
    driver.submit([1, 2])
    plan = driver.plan()
    with pytest.raises(KeyError):
        driver.scheduler.commit(plan, StepResult({7: Sampled(1)}), 0.0, 0.0)
