"""Prefix sharing as the scheduler does it: what is computed once, kept, salted, forgotten."""

from fastserve_jax.core.sequence import Sequence
from fastserve_jax.core.types import Request, Sampling
from tests.core.driver import Driver, limits
from tests.fakes import link, score

SMALL = limits()


def test_equal_prefixes_are_computed_once():
    driver = Driver(SMALL)
    driver.submit(range(10), max_tokens=2)
    driver.run()
    driver.submit([*range(10), 40, 41], max_tokens=2)
    plan = driver.turn()
    assert driver.work(plan) == [(2, 8, 4)]
    assert plan.work[0].pages[:2] == driver.plans[0].work[0].pages[:2]
    driver.run()
    assert driver.started[1].cached_tokens == 0
    assert driver.started[2].cached_tokens == 8
    driver.assert_all_as_alone()


def test_a_running_sequence_shares_its_pages():
    driver = Driver(limits(step_tokens=32))
    driver.submit(range(8), max_tokens=9)
    driver.plan()
    driver.submit([*range(8), 9])
    driver.plan()
    assert driver.plans[1].work[-1].start == 0  # not before the step is committed
    driver.commit()
    driver.submit([*range(8), 8])
    driver.plan()
    assert driver.plans[2].work[-1].start == 8
    driver.run()
    driver.assert_all_as_alone()


def test_a_fully_known_prompt_still_runs_its_last_token():
    driver = Driver(SMALL)
    for _ in range(2):
        driver.submit(range(8), max_tokens=1)
        driver.run()
    assert driver.work(driver.plans[1]) == [(2, 4, 4)]
    driver.assert_all_as_alone()


def test_output_is_shared_with_the_next_turn_of_a_conversation():
    driver = Driver(SMALL)
    driver.submit(range(4), max_tokens=9)
    driver.run()
    driver.submit([*range(4), *driver.outputs[1], 5, 6], max_tokens=1)
    driver.run()
    assert driver.started[2].cached_tokens == 12


def test_salts_do_not_mix():
    driver = Driver(SMALL)
    for salt in ("alice", "bob", "alice"):
        driver.submit(range(10), salt=salt)
        driver.run()
    assert [driver.started[i].cached_tokens for i in (1, 2, 3)] == [0, 0, 8]


def test_concurrent_equal_prompts_keep_private_copies():
    driver = Driver(limits(step_tokens=32))
    driver.submit(range(9), max_tokens=3)
    driver.submit(range(9), max_tokens=3, seed=1)
    driver.run()
    assert driver.scheduler.stats().pages_cached == 2
    driver.assert_all_as_alone()


def test_the_longest_unused_prefix_is_forgotten_first_and_from_its_end():
    driver = Driver(limits(num_pages=6))
    for start in (10, 20):  # two pages each stay
        driver.submit(range(start, start + 8), max_tokens=1)
        driver.run()
    driver.submit([*range(10, 18), 0], max_tokens=1)  # 10.. is younger now
    driver.run()
    driver.submit(range(30, 42), max_tokens=1)  # takes the two free ones and one of 20..
    driver.run()
    for start, cached in ((10, 8), (20, 4)):
        assert driver.scheduler._books.match(probe(driver, start)).positions == cached


def probe(driver, start):
    request = Request(999, (*range(start, start + 8), 0), Sampling(max_tokens=1))
    seq = Sequence(request, list(request.prompt))
    driver.scheduler._books._extend_chain(seq, 9)
    return seq


def test_prompt_logprobs_compute_every_prompt_position():
    driver = Driver(SMALL)
    driver.submit(range(10))
    driver.run()
    driver.submit(range(10), prompt_logprobs=0)
    driver.run()
    assert driver.started[2].cached_tokens == 0
    driver.assert_all_as_alone()
    chain = link(7, 0)
    assert driver.scored[2][0].logprob == score(chain, 1)
