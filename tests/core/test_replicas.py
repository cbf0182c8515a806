"""Several schedulers that step together: everybody still gets what it would get alone, each request
has one home, and work is spread by what is owed and what is cached."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.core.policy import POLICIES
from fastserve_jax.core.scheduler import Limits
from fastserve_jax.errors import InvalidRequest, Overloaded
from tests.core.driver import Driver
from tests.core.lives import COSTS, draw, live
from tests.core.test_lives import bounds, calm, costs, moves

ROOM = Limits(page_size=4, num_pages=40, max_slots=4, step_tokens=16, max_context=64)
policies = st.sampled_from([name for name in POLICIES if name != "eager"])


@calm
@given(
    bounds.map(lambda limits: replace(limits, guesses=0)),
    policies,
    st.integers(0, 1),
    st.lists(moves, max_size=60),
    costs,
    st.integers(2, 4),
)
def test_everybody_gets_what_it_gets_alone(limits, name, overlap, script, cost, replicas):
    driver = live(limits, name, overlap, script, cost=cost, replicas=replicas)
    assert driver.done.keys() == driver.requests.keys()
    driver.assert_all_as_alone()


def test_in_these_lives_replicas_are_busy_alone_and_together():
    seen = {"alone": 0, "together": 0, "preemptions": 0, "pages_in": 0}
    for seed in range(100):
        life = draw(random.Random(seed))
        limits = replace(life.limits, guesses=0)
        name = "adaptive" if life.policy == "eager" else life.policy
        parts = limits, name, life.overlap, life.script, life.nan, life.cost
        driver = live(*parts, replicas=2)
        for plan in driver.plans:
            busy = sum(bool(own.work) for own in plan.replicas)
            seen["alone"] += busy == 1
            seen["together"] += busy == 2
        stats = driver.scheduler.stats()
        seen["preemptions"] += stats.preemptions
        seen["pages_in"] += stats.pages_in
    assert min(seen.values()) > 50, seen


def homes(driver):
    """How many requests each replica has taken in."""
    return [len(device.admitted) for device in driver.devices]


def test_work_is_spread():
    driver = Driver(ROOM, replicas=3)
    for number in range(9):
        driver.submit([number * 5 + i for i in range(5)], 4)
    driver.run()
    assert homes(driver) == [3, 3, 3]


def test_a_long_prompt_counts_for_several_short_ones():
    driver = Driver(ROOM, replicas=2)
    driver.submit(range(40), 4)
    for number in range(4):
        driver.submit([50 + number * 5 + i for i in range(5)], 4)
    driver.run()
    assert sorted(homes(driver)) == [1, 4] or homes(driver) == [2, 3]


def test_a_prefix_that_is_cached_brings_the_next_there():
    driver = Driver(ROOM, replicas=2)
    prompt = list(range(20))
    other = driver.submit([99], 60)
    driver.turn()
    driver.submit(prompt, 2)  # not to where somebody is
    for _ in range(8):
        driver.turn()
    driver.cancel(other)
    driver.run()
    assert homes(driver) == [1, 1]
    for _ in range(3):
        driver.submit([*prompt, 77], 2)
        driver.run()
    assert homes(driver) == [1, 4]
    assert driver.scheduler.stats().prefix_hit_tokens == 3 * 20


def test_a_prefix_does_not_bring_them_all_to_one():
    driver = Driver(ROOM, replicas=2)
    prompt = list(range(20))
    driver.submit(prompt, 2)
    driver.run()
    for _ in range(8):
        driver.submit([*prompt, 77], 30)
    driver.run()
    assert min(homes(driver)) >= 3


def test_a_full_replica_is_passed_over():
    limits = replace(ROOM, max_slots=1, step_tokens=4, max_queue=2, max_live=3)
    driver = Driver(limits, replicas=2)
    driver.submit(range(20), 30)
    driver.run()
    for _ in range(4):  # all like the cached one, which has room for three at most
        driver.submit(range(20), 2)
    driver.run()
    assert min(homes(driver)) >= 1


def test_whoever_has_room_takes_it_and_a_request_is_refused_once():
    limits = replace(ROOM, max_slots=1, step_tokens=4, max_queue=1, max_live=2)
    driver = Driver(limits, replicas=3)
    taken = refused = 0
    for _ in range(8):
        try:
            driver.submit(range(20), 2)
            taken += 1
        except Overloaded:
            refused += 1
    stats = driver.scheduler.stats()
    assert (taken, refused) == (3, 5)
    assert (stats.submitted, stats.rejected) == (3, 5)
    with pytest.raises(InvalidRequest):
        driver.submit([], 2)
    assert driver.scheduler.stats().rejected == 6
    driver.run()


def test_steps_of_one_then_of_the_other_are_all_busy():
    driver = Driver(ROOM, replicas=2)
    for start in (0, 50):
        driver.submit([start, start + 1, start + 2], 6)
        driver.run()
    stats = driver.scheduler.stats()
    assert stats.busy_s == pytest.approx(stats.steps * driver.step_s)
    assert stats.stall_s <= stats.busy_s


def test_a_step_is_learned_as_what_the_longest_plan_weighed():
    driver = Driver(ROOM, replicas=3, cost=COSTS["learned"].copy())
    driver.submit(range(40), 4)
    driver.submit([50, 51, 52], 4)
    plan = driver.plan()
    most, least, nothing = (own.load.prefill_tokens for own in plan.replicas)
    assert most == plan.load.prefill_tokens > least > nothing == 0
    models = [scheduler.cost for scheduler in driver.scheduler._schedulers]
    unlearned, wanted = models[2].copy(), models[1].copy()
    wanted.observe(plan.load, driver.step_s)
    driver.commit()
    assert models[0] == models[1] == wanted != unlearned
    assert models[2] == unlearned, "who had no plan learns nothing"
