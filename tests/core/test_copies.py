"""Copies before they are needed: fetched ahead, written behind, spread over the steps."""

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.mlfq import SkipJoinMLFQ
from tests.core.driver import Driver, limits
from tests.core.test_host import Urgent, fill, resumed, saved, swapping, turns


def test_what_is_away_is_fetched_while_another_runs():
    driver = swapping()
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.submit([60, 61], max_tokens=6, priority=-1)
    driver.run()
    (fetching,) = [plan for plan in driver.plans if plan.swap_in]
    (entering,) = [p for p in driver.plans[1:] for a in p.admissions if a.request_id == 1]
    assert [work.request_id for work in fetching.work] == [3]
    assert len(fetching.swap_in) == 5  # with the last one, partly full
    assert not entering.swap_in
    assert resumed(driver, 1) == [0, 18]
    assert driver.scheduler.stats().host_hit_tokens == 18
    driver.assert_all_as_alone()


def test_what_is_fetched_early_leaves_again_for_a_better_one():
    driver = swapping()
    written = saved(driver)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.submit([60, 61], max_tokens=6, priority=-1)
    while not driver.scheduler.stats().pages_in:
        driver.turn()
    fill(driver, 30, priority=-2)
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.pages_in == 5 + 5 + 1  # and that one had its own
    assert stats.host_hit_tokens == 18 + 2  # what was fetched in vain is no hit
    assert stats.recomputed_tokens == 0
    assert len(written) == len(set(written))
    driver.assert_all_as_alone()


def test_copies_are_spread_over_the_steps_that_hide_them():
    cost = CostModel([0.01], (1,), 0.01, 0.0, page_out_s=4e-3, page_in_s=4e-3, overlaps=True)
    policy = Urgent()
    driver = swapping(policy, cost=cost)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.submit([60, 61], max_tokens=9, priority=-1)
    turns(driver, 2)
    assert driver.scheduler.stats().pages_out == 5
    policy.copy_credit_s = lambda: 0.0  # from now on no step may be longer for copies
    driver.run()
    # Two are hidden behind a step of one row.
    assert [len(plan.swap_in) for plan in driver.plans if plan.swap_in] == [2, 2, 1]
    assert driver.scheduler.stats().recomputed_tokens == 0
    driver.assert_all_as_alone()


def test_nobody_enters_for_whom_more_must_leave_than_a_step_hides():
    """It is copied bit by bit while its owner runs on, who gives way when that is done."""
    cost = CostModel([0.01], (1,), 0.01, 0.0, page_out_s=4e-3, page_in_s=4e-3, overlaps=True)
    policy = Urgent()
    policy.copy_credit_s = lambda: 0.0
    driver = swapping(policy, cost=cost)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.run()
    assert driver.scheduler.stats().preemptions == 1
    assert list(driver.done) == [2, 1]
    assert max(len(plan.swap_out) for plan in driver.plans) <= 2
    driver.assert_all_as_alone()


def test_a_reserve_is_kept_that_can_be_taken_at_once():
    """Written behind: pages are in host memory before they have to leave the device."""
    bounds = limits(num_pages=14, host_pages=64, max_slots=2, step_tokens=32)
    cost = CostModel([0.0], (1,), 1.0, 1.0)
    policy = SkipJoinMLFQ(bounds, cost, quantum_s=2.0, starve_s=1e9, levels=4)
    driver = Driver(bounds, policy)
    assert policy.reserve_pages == 2
    for first in (0, 20):
        driver.submit(range(first, first + 21), max_tokens=8)
    turns(driver, 2)
    books = driver.scheduler._books
    driver.submit([60], max_tokens=1)
    driver.until_preempted()
    turns(driver, 2)
    (keeper,) = books.index.keepers
    kept = books.index.kept(keeper)
    seq = books.sequences[keeper]
    ready = [page for page in kept if books.index.digest(page) in books.host]
    assert len(kept) == -(-seq.charged // 4)  # all of its pages are still here
    assert books.index.disposable + len(ready) >= 2
    assert ready == kept[: len(ready)] != []  # the last ones, for they are the first to go
    driver.run()
    assert driver.scheduler.stats().recomputed_tokens == 0
    driver.assert_all_as_alone()


def test_a_large_newcomer_does_not_wait_for_ever_behind_copies():
    """A step bears one copy, and all pages are kept for those who wait: they are copied for it bit
    by bit, and it enters while others go on running."""
    cost = CostModel([0.1], page_out_s=0.004, page_in_s=1e-9)
    d = Driver(limits(num_pages=16, host_pages=200, step_tokens=48), "mlfq", cost=cost)
    for i in range(6):
        d.submit(range(i, i + 8), max_tokens=24)
    for _ in range(40):
        d.now += 0.1
        d.turn()
    large = d.submit(range(40, 80), max_tokens=2)
    entered = None
    for turn in range(400):
        d.now += 0.1
        if d.scheduler.stats().waiting < 4:
            d.submit([turn % 60, turn % 7, 5], max_tokens=20)
        d.turn()
        if large in d.device.admitted:
            entered = turn
            break
    assert entered is not None
    assert d.scheduler.stats().running > 0
    d.run()
    d.assert_all_as_alone()
