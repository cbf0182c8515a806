"""Prompts that an encoder reads: in one step, or not at all; nothing is shared but by the whole."""

import pytest

from fastserve_jax.errors import InvalidRequest
from tests.core.driver import Driver, limits


def driver(policy="fcfs", **changes):
    return Driver(limits(encodes=True, step_tokens=20, **changes), policy)


def sources_run(driver):
    """(request, first position, tokens) of all work that begins in a source."""
    return [
        (work.request_id, work.start, work.count)
        for plan in driver.plans
        for work in plan.work
        if work.start < len(driver.requests[work.request_id].prompt) - 1
    ]


def test_each_source_is_in_one_step_and_the_first_in_rank_waits_for_room():
    made = driver()
    for first in (0, 20, 40):
        made.submit(range(first, first + 14), max_tokens=6)
    made.run()
    assert sources_run(made) == [(1, 0, 14), (2, 0, 14), (3, 0, 14)]
    steps = [plan.step for plan in made.plans if plan.admissions]
    assert len(set(steps)) == 3, "two do not fit into a step"
    made.assert_all_as_alone()


def test_sources_that_begin_alike_share_nothing_and_the_same_one_its_full_pages():
    made = driver()
    for length in (17, 13, 14, 13):  # 12 of a source fill three pages
        made.submit(range(length), max_tokens=3)
        made.run()
    assert [made.started[id].cached_tokens for id in (1, 2, 3, 4)] == [0, 0, 0, 12]
    assert sources_run(made) == [(1, 0, 17), (2, 0, 13), (3, 0, 14)]
    made.assert_all_as_alone()


@pytest.mark.parametrize("host_pages", [0, 3, 64])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_what_is_lost_of_a_source_is_run_again_with_all_of_it(policy, host_pages):
    made = driver(policy, num_pages=12, host_pages=host_pages)
    for i in range(6):
        made.submit(range(9 * i, 9 * i + 9 + i), max_tokens=18, priority=-i)
        made.turn()
    made.run()
    assert made.scheduler.stats().preemptions > 0
    for request_id, start, count in sources_run(made):
        assert start == 0
        assert count >= len(made.requests[request_id].prompt)
    made.assert_all_as_alone()


def test_a_source_that_might_never_find_room_is_refused():
    made = driver()
    made.submit(range(17), max_tokens=2)  # 16 beside three others' tokens, and its own
    with pytest.raises(InvalidRequest, match="17 tokens, and an encoder reads at most 16"):
        made.submit(range(18), max_tokens=2)
    made.run()
