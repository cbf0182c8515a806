"""Host memory as the second home of pages: its index, and what the scheduler makes of it."""

import pytest

from fastserve_jax.core.books import Books
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.host import HostIndex
from fastserve_jax.core.mlfq import SkipJoinMLFQ
from fastserve_jax.core.ordering import FirstComeFirstServed
from fastserve_jax.core.prefix import extend_chain
from tests.core.driver import Driver, known, limits

A, B, C, D = (letter.encode() for letter in "abcd")


class Urgent(FirstComeFirstServed):
    """A better priority takes the slot."""

    preempts = True
    swaps = True


# The index


def filled(*digests: bytes, spare: int = 0) -> HostIndex:
    index = HostIndex(len(digests) + spare)
    for digest in digests:
        index.put(digest)
    index.unpin()
    return index


def test_the_longest_unused_copy_makes_room():
    index = filled(A, B, C)
    page = index.find(B)
    index.touch(A)
    assert index.put(D) == page
    assert [digest in index for digest in (A, B, C, D)] == [True, False, True, True]
    index.unpin()
    index.check()
    assert index.used == 3


def test_what_is_outdated_goes_first():
    index = filled(A, B, C)
    index.outdate(C)
    index.put(D)
    assert C not in index
    index.outdate(C)  # unknown: nothing happens
    index.touch(C)
    index.unpin()
    index.check()


def test_a_page_is_written_once_in_a_plan():
    index = filled(spare=2)
    assert {index.put(A), index.put(B)} == {0, 1}
    assert index.put(C) is None
    assert A in index
    assert B in index
    index.unpin()
    assert index.put(C) is not None
    assert A not in index


def test_a_page_read_in_a_plan_is_not_written_in_it():
    index = filled(A, B)
    index.pin([index.find(A)])
    assert index.put(C) is not None
    assert A in index
    assert index.put(D) is None
    index.unpin()
    index.check()


def test_a_prefix_is_found_up_to_its_first_gap():
    index = filled(A, B, C)
    index.outdate(B)
    assert known(index, [A, C, D]) == [index.find(A), index.find(C)]
    index.put(D)
    assert known(index, [A, B, C]) == [index.find(A)]


def test_no_tier_holds_nothing():
    index = HostIndex(0)
    assert index.put(A) is None
    assert index.find(A) is None
    index.check()


# In the scheduler


def swapping(policy=None, **changes) -> Driver:
    """One slot, and eight pages of four tokens."""
    fields = {"num_pages": 8, "host_pages": 64, "max_slots": 1, "step_tokens": 32}
    cost = changes.pop("cost", None)
    return Driver(limits(**(fields | changes)), policy or Urgent(), cost=cost)


def fill(driver: Driver, first: int = 40, priority: int = -1) -> int:
    """Ask for all pages of the pool, before everybody else."""
    return driver.submit(range(first, first + 30), max_tokens=3, priority=priority)


def resumed(driver: Driver, request_id: int) -> list[int]:
    """Where a request started, every time it was admitted."""
    return [
        work.start
        for plan in driver.plans
        for admission in plan.admissions
        for work in plan.work
        if admission.request_id == work.request_id == request_id
    ]


def saved(driver: Driver) -> list[bytes]:
    """Names of pages as they are written to host memory."""
    books, names = driver.scheduler._books, []
    save = books.save
    books.save = lambda page, digest: (names.append(digest), save(page, digest))[1]
    return names


def turns(driver: Driver, count: int) -> None:
    for _ in range(count):
        driver.turn()


@pytest.mark.parametrize("host_pages", [5, 64])
def test_a_preempted_sequence_comes_back_without_computing_again(host_pages):
    """Also where what it displaces in turn has no room in host memory beside it."""
    driver = swapping(host_pages=host_pages)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.run()
    stats = driver.scheduler.stats()
    assert (stats.preemptions, stats.recomputed_tokens) == (1, 0)
    # All of its pages went, the last of them partly full, and all came back.
    at = resumed(driver, 1)[1]
    assert at == 18
    assert stats.pages_in == 5
    assert stats.host_hit_tokens == at
    assert driver.device.positions_run == 13 + 11 + 30 + 2
    driver.assert_all_as_alone()


def test_pages_still_on_the_device_are_not_copied_back():
    driver = swapping()
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    driver.submit(range(30, 42), max_tokens=3, priority=-1)  # four pages: two of the other's five
    driver.run()
    stats = driver.scheduler.stats()
    assert (stats.preemptions, stats.recomputed_tokens) == (1, 0)
    assert (stats.pages_in, stats.host_hit_tokens) == (1, 2)
    driver.assert_all_as_alone()


def test_a_second_preemption_writes_only_new_pages():
    driver = swapping()
    written = saved(driver)
    driver.submit(range(13), max_tokens=18)
    seq = driver.scheduler._books.sequences[1]
    for first in (40, 80):
        turns(driver, 6)
        fill(driver, first)
        while driver.scheduler.stats().waiting + driver.scheduler.stats().ending:
            driver.turn()
    chain = list(seq.chain)
    driver.run()
    stats = driver.scheduler.stats()
    assert (stats.preemptions, stats.recomputed_tokens) == (2, 0)
    assert len(written) == len(set(written)) == stats.pages_out
    first, second = resumed(driver, 1)[1:]
    own = [digest for digest in written if digest in chain]
    assert len(own) == second // 4 > first // 4
    assert stats.pages_in == -(-first // 4) + -(-second // 4)
    driver.assert_all_as_alone()


@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
def test_a_partly_full_page_makes_the_round_trip(outputs):
    driver = swapping()
    driver.submit(range(13), max_tokens=12)
    while len(driver.outputs[1]) < outputs:
        driver.turn()
    fill(driver)
    driver.run()
    at = resumed(driver, 1)[1]
    assert at == 13 + outputs
    assert driver.scheduler.stats().recomputed_tokens == 0
    assert driver.scheduler.stats().pages_in == -(-at // 4)
    driver.assert_all_as_alone()


@pytest.mark.parametrize("host_pages", [1, 2, 3])
def test_with_host_memory_full_what_is_lost_is_computed_again(host_pages):
    driver = swapping(host_pages=host_pages)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.preemptions == 1
    assert stats.recomputed_tokens > 0
    assert stats.host_pages_used == host_pages
    assert driver.device.positions_run == 13 + 11 + 30 + 2 + stats.recomputed_tokens
    driver.assert_all_as_alone()


def test_a_prompt_is_served_from_host_memory():
    ran = []
    for host_pages in (0, 64):
        driver = swapping(host_pages=host_pages)
        for prompt in (range(18), range(30, 60), [*range(16), 9, 9]):
            driver.submit(prompt, max_tokens=2)
            driver.run()
        driver.assert_all_as_alone()
        ran.append(driver.device.positions_run)
    stats = driver.scheduler.stats()
    assert stats.host_hit_tokens == 16
    assert stats.pages_in == 4
    assert driver.started[3].cached_tokens == 16
    assert ran[0] - ran[1] == 16
    assert stats.recomputed_tokens == 0  # that counts only what a preemption lost


def test_a_prompt_asked_for_again_stays_in_host_memory():
    driver = swapping(host_pages=8)
    written = saved(driver)
    often, once = [*range(16), 1], [*range(20, 36), 1]
    for prompt in (often, once, range(30, 60), often, range(40, 70), often):
        driver.submit(prompt, max_tokens=1)
        driver.run()
    assert [driver.started[i].cached_tokens for i in (4, 6)] == [16, 16]
    assert driver.scheduler.stats().host_hit_tokens == 32
    chain = []
    extend_chain(chain, often, 4, "")
    assert sorted(digest for digest in written if digest in chain) == sorted(chain)  # once
    driver.assert_all_as_alone()


def test_what_leaves_the_device_is_the_youngest_in_host_memory():
    books = Books(limits(host_pages=2))
    for digest in (A, B):
        books.host.put(digest)
    books.take_swaps()
    books._evicted(0, A, None)
    books.host.put(C)
    assert A in books.host
    assert B not in books.host


def test_a_partly_full_copy_that_is_out_of_date_goes_first():
    driver = swapping()
    outdated = []
    driver.scheduler._books.host.outdate = outdated.append
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    seq = driver.scheduler._books.sequences[1]
    fill(driver)
    driver.turn()
    _, tail = seq.tail
    driver.run()
    assert outdated == [tail]  # it came back to be written further
    driver.submit(range(20, 33), max_tokens=12)
    turns(driver, 6)
    seq = driver.scheduler._books.sequences[3]
    fill(driver)
    driver.turn()
    _, tail = seq.tail
    driver.cancel(3)
    assert outdated[1:] == [tail]
    driver.run()
    driver.assert_all_as_alone()


def test_between_pages_in_host_memory_those_on_the_device_are_used():
    """The beginning of a waiting sequence was another's too, and is evicted when that one ends."""
    driver = swapping(num_pages=9, max_slots=2)
    driver.submit(range(8), max_tokens=2)
    driver.run()
    driver.submit([*range(8), 8], max_tokens=4)  # holds the first two pages with it
    driver.submit([*range(8), *range(20, 29)], max_tokens=6, priority=1)
    turns(driver, 2)
    driver.submit(range(30, 40), max_tokens=9, priority=-1)
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.preemptions == 1
    assert stats.host_hit_tokens > 0
    assert stats.recomputed_tokens == 0
    driver.assert_all_as_alone()


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_nobody_waits_for_is_copied_only_beside_the_steps(overlaps):
    """A page takes a fifth of a step: too long to hold it up for."""
    cost = CostModel([0.01], (1,), 0.01, 0.0, page_out_s=2e-3, page_in_s=2e-3, overlaps=overlaps)
    driver = swapping(cost=cost)
    for first in (0, 30, 60):
        driver.submit(range(first, first + 30), max_tokens=3)
        driver.run()
    stats = driver.scheduler.stats()
    assert (stats.pages_out > 0) == overlaps
    assert stats.stall_s == 0.0


def test_no_copies_where_computing_is_cheaper():
    cost = CostModel(page_out_s=1.0, page_in_s=1.0)
    driver = swapping(cost=cost)
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    driver.run()
    stats = driver.scheduler.stats()
    assert (stats.pages_out, stats.pages_in, stats.host_pages_used) == (0, 0, 0)
    assert stats.recomputed_tokens > 0
    driver.assert_all_as_alone()


def test_no_copy_is_fetched_where_computing_has_become_cheaper():
    driver = swapping()
    driver.submit(range(13), max_tokens=12)
    turns(driver, 6)
    fill(driver)
    while not driver.scheduler.stats().pages_out:
        driver.turn()
    driver.scheduler.cost.page_in_s = 1.0
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.pages_in == 0
    assert stats.recomputed_tokens > 0
    driver.assert_all_as_alone()


def test_a_policy_that_does_not_swap_copies_nothing():
    driver = swapping("fcfs")
    for first in (0, 20, 40):
        driver.submit(range(first, first + 13), max_tokens=12)
    driver.run()
    assert driver.scheduler.stats().pages_out == 0


# Copies before they are needed


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
