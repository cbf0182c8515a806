"""Who makes room for whom, and that it costs nobody a token."""

import pytest

from fastserve_jax.core.ordering import FirstComeFirstServed
from tests.core.driver import Driver, limits, pressed


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_memory_pressure_preempts_and_resumes_exactly(policy, overlap):
    driver = pressed(policy, overlap=overlap)
    driver.run()
    assert driver.scheduler.stats().preemptions >= 1
    driver.assert_all_as_alone()


def test_the_lowest_rank_makes_room_and_keeps_its_token_in_flight():
    driver = pressed()
    driver.until_preempted()
    before, now = ([row[0] for row in driver.work(plan)] for plan, _ in driver.in_flight)
    assert (before, now) == ([1, 2], [1])  # its page is the other's in the same plan
    stats = driver.scheduler.stats()
    assert (stats.running, stats.waiting, stats.ending) == (1, 0, 1)
    known = len(driver.outputs[2])
    driver.commit()
    assert len(driver.outputs[2]) == known + 1
    assert driver.scheduler.stats().waiting == 1
    while driver.device.admitted.count(2) < 2:
        driver.turn()
    again = next(a for plan in driver.plans[1:] for a in plan.admissions)
    assert len(again.tokens) == 7 + known
    assert again.prompt_tokens == 6
    driver.run()
    assert driver.device.admitted.count(1) == 1
    driver.assert_all_as_alone()


def test_a_preempted_sequence_resumes_from_its_pages_where_they_last():
    driver = pressed()
    driver.run()
    resumed = [w for p in driver.plans for a in p.admissions[:1] for w in p.work
               if w.request_id == a.request_id and len(a.tokens) > 6]  # fmt: skip
    assert resumed
    assert resumed[0].start > 0
    assert driver.started[2].cached_tokens == 0  # its prompt was not in the cache when it came


def test_prompt_logprobs_survive_preemption_without_repeats():
    driver = Driver(limits(num_pages=10, step_tokens=4), "mlfq")
    driver.submit(range(30), max_tokens=2, prompt_logprobs=0)
    for _ in range(3):
        driver.turn()
    driver.submit(range(40, 50), max_tokens=2, priority=-1)
    driver.run()
    assert driver.device.admitted == [1, 2, 1]
    driver.assert_all_as_alone()


def test_no_two_sequences_evict_each_other_in_turn():
    driver = Driver(limits(num_pages=9, max_slots=4, step_tokens=16))
    for i in range(4):
        driver.submit(range(10 * i, 10 * i + 6), max_tokens=24)
    driver.run()
    assert driver.scheduler.stats().preemptions <= 12
    driver.assert_all_as_alone()


def test_the_better_rank_takes_the_last_page_and_the_other_stands_still():
    driver = Driver(limits(num_pages=3))
    driver.submit([1, 2], max_tokens=4, priority=1)
    driver.plan()
    driver.submit([3, 4, 5], max_tokens=3)
    driver.run()  # both reach the end of their page in the same step
    assert driver.scheduler.stats().preemptions == 0
    assert list(driver.done) == [2, 1]
    driver.assert_all_as_alone()


def test_nobody_enters_on_the_page_that_a_better_one_wants_next():
    driver = Driver(limits(num_pages=4, step_tokens=16))
    driver.submit(range(3), max_tokens=13)
    driver.turn()
    driver.submit(range(10, 19), max_tokens=3)  # would fit the three free pages exactly
    driver.run()
    assert driver.scheduler.stats().preemptions == 0
    driver.assert_all_as_alone()


def test_what_was_freed_for_one_is_not_taken_by_a_lesser():
    driver = Driver(limits(num_pages=8, step_tokens=64))
    driver.submit(range(17), max_tokens=3, priority=1)
    driver.plan()
    driver.submit(range(20, 45), max_tokens=3)  # seven pages: all but one
    driver.submit(range(50, 55), max_tokens=2)  # two, and three are free
    driver.run()
    assert driver.scheduler.stats().preemptions == 1
    assert driver.device.admitted == [1, 2, 3, 1]
    driver.assert_all_as_alone()


def test_a_misfit_does_not_stop_those_behind_it():
    driver = Driver(limits(num_pages=12, step_tokens=32))
    driver.submit(range(16), max_tokens=8)
    driver.turn()
    driver.submit(range(20, 52), max_tokens=2)  # nine pages: not now
    driver.submit([60, 61], max_tokens=2)
    assert 3 in [row[0] for row in driver.work(driver.turn())]
    driver.run()
    driver.assert_all_as_alone()


def test_a_large_request_is_not_overtaken_for_ever():
    driver = Driver(limits(num_pages=12, step_tokens=32, max_slots=3))
    driver.submit(range(8), max_tokens=10)
    big = driver.submit(range(12, 50), max_tokens=6)
    for i in range(200):
        if big in driver.done:
            break
        if driver.scheduler.stats().waiting < 3:
            driver.submit([i % 60, i % 7], max_tokens=6)
        driver.turn()
    assert big in driver.done
    driver.run()
    driver.assert_all_as_alone()


class Urgent(FirstComeFirstServed):
    preempts = True


def test_nobody_makes_room_for_one_that_could_run_nothing():
    """The budget is the better prompt's for four steps: until then the last one keeps its slot."""
    driver = Driver(limits(max_slots=2, num_pages=32), Urgent())
    driver.submit(range(10, 40), max_tokens=2, priority=2)
    driver.plan()
    driver.submit(range(32), max_tokens=2, priority=0)
    for _ in range(2):
        driver.turn()
    driver.submit([50, 51], max_tokens=2, priority=1)
    for _ in range(2):
        driver.turn()
        assert driver.scheduler.stats().preemptions == 0
    driver.run()
    assert driver.scheduler.stats().preemptions == 1
    assert driver.device.admitted == [1, 2, 3, 1]
    driver.assert_all_as_alone()


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("step_tokens", [4, 8, 32])
def test_what_is_computed_again_is_counted(overlap, step_tokens):
    """Also where it is preempted again in the middle of that."""
    driver = Driver(limits(num_pages=9, step_tokens=step_tokens), overlap=overlap)
    for i in range(4):
        driver.submit(range(10 * i, 10 * i + 6), max_tokens=24)
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.recomputed_tokens > 0
    assert driver.device.positions_run == 4 * (6 + 23) + stats.recomputed_tokens
    assert stats.computed_tokens == driver.device.positions_run


def test_fcfs_never_takes_a_slot():
    driver = Driver(limits(max_slots=1))
    driver.submit([1, 2], max_tokens=9)
    driver.turn()
    driver.submit([3, 4], max_tokens=1, priority=-1)
    driver.run()
    assert driver.device.admitted == [1, 2]
    assert driver.scheduler.stats().preemptions == 0


def test_priority_orders_the_queue():
    driver = Driver(limits(max_slots=1))
    for priority in (2, 0, 1, 0):
        driver.submit([1, 2], max_tokens=1, priority=priority)
    driver.run()
    assert driver.device.admitted == [2, 4, 3, 1]
