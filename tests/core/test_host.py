"""Host memory as the second home of pages: its index, and what the scheduler makes of it."""

import pytest

from fastserve_jax.core.books import Books
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.host import HostIndex
from fastserve_jax.core.ordering import FirstComeFirstServed
from fastserve_jax.core.prefix import extend_chain
from tests.core.driver import Driver, limits

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
