"""Guessing, on the checking device: what is kept of guesses, when they are made, and when not."""

import random
from dataclasses import replace

import pytest

from fastserve_jax.core import draft, scheduler, speculate
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.lookup import Lookup
from fastserve_jax.core.ordering import FirstComeFirstServed
from fastserve_jax.core.types import Finish
from tests.core.driver import Driver, limits
from tests.core.lives import draw
from tests.fakes import alone

BOUNDS = limits(guesses=7, max_slots=8, step_tokens=32, max_context=128, num_pages=128)


class Seer(Lookup):
    """Knows what will come, and is wrong at every `wrong_every`th position; 0: never."""

    futures: dict[tuple[int, ...], list[int]] = {}  # noqa: RUF012
    wrong_every = 0
    chance = 0.9

    def __init__(self, tokens, given, odds):
        super().__init__(tokens, given, odds)
        self.whole = [*tokens[:given], *self.futures[tuple(tokens[:given])], *[0] * 9]
        self.known = tokens

    @property
    def expects(self):
        return True

    def guess(self, count):
        start = len(self.known)
        return tuple(
            self.whole[at] + (self.wrong_every > 0 and at % self.wrong_every == 0)
            for at in range(start, start + count)
        )

    def chances(self, count):
        return [self.chance ** (i + 1) for i in range(count)]


@pytest.fixture
def seer(monkeypatch):
    monkeypatch.setattr(Seer, "futures", {})
    monkeypatch.setattr(Seer, "wrong_every", 0)
    monkeypatch.setattr(speculate, "Lookup", Seer)
    return Seer


def submit(driver, prompt, max_tokens=40, **rest):
    request_id = driver.submit(prompt, max_tokens, **rest)
    Seer.futures[tuple(prompt)] = alone(driver.requests[request_id])[0]
    return request_id


def guesses(driver):
    return [work.guesses for plan in driver.plans for work in plan.work if work.guesses]


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3, 5, 9])
def test_all_that_is_right_up_to_the_first_wrong_one_is_kept(seer, overlap, wrong_every):
    seer.wrong_every = wrong_every
    driver = Driver(BOUNDS, overlap=overlap)
    submit(driver, range(5))
    driver.run()
    driver.assert_all_as_alone()
    stats = driver.scheduler.stats()
    assert stats.guessed_tokens == sum(map(len, guesses(driver))) > 0
    assert stats.output_tokens == 40
    decodes = len(driver.plans) - 1
    assert stats.accepted_tokens == 40 - 1 - decodes  # each step gives one more
    if wrong_every == 0:
        assert stats.accepted_tokens == stats.guessed_tokens
        assert decodes <= 7
    if wrong_every == 1:
        assert stats.accepted_tokens == 0


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_it_ends_where_it_would_alone(seer, max_tokens):
    driver = Driver(BOUNDS)
    submit(driver, range(5), max_tokens)
    stopped = submit(driver, range(9, 12), 40, stop_ids=[alone_at(driver, range(9, 12), 5)])
    driver.run()
    driver.assert_all_as_alone()
    assert driver.done[stopped].reason is Finish.STOP
    assert all(
        work.start + work.count < 5 + max_tokens
        for plan in driver.plans
        for work in plan.work
        if work.request_id == 1 and work.guesses
    )


def alone_at(driver, prompt, index):
    """The token that the prompt's answer has there."""
    other = Driver(BOUNDS)
    other.submit(prompt, 40)
    return alone(other.requests[1])[0][index]


def test_bad_numbers_behind_right_guesses_end_it_there(seer):
    driver = Driver(BOUNDS, nan={(1, 10)})
    submit(driver, range(5))
    driver.run()
    driver.assert_all_as_alone()
    assert driver.done[1].reason is Finish.ERROR
    assert driver.done[1].output_tokens == 10


def test_nothing_is_planned_behind_guesses_and_everything_beside_them(seer):
    driver = Driver(BOUNDS)
    submit(driver, range(5))
    submit(driver, range(20, 26))
    while not driver.plans or not driver.plans[-1].guesses:
        driver.turn()
    assert len(driver.plans[-1].work) == 2
    submit(driver, range(40, 44))
    assert driver.plan() is None
    driver.commit()
    assert {work.request_id for work in driver.plan().work} == {1, 2, 3}
    driver.run()
    driver.assert_all_as_alone()


def test_without_guesses_a_plan_is_made_beside_another():
    driver = Driver(replace(BOUNDS, guesses=0))
    driver.submit([1, 2] * 8, 20)
    driver.plan()
    assert driver.plan() is not None


def test_a_cancelled_sequence_leaves_nothing(seer):
    driver = Driver(BOUNDS)
    submit(driver, range(5))
    while not driver.plans or not driver.plans[-1].guesses:
        driver.turn()
    driver.cancel(1)
    driver.run()
    assert driver.done[1].reason is Finish.CANCELLED


@pytest.mark.parametrize("num_pages", [11, 12, 16])
def test_guesses_take_nobodys_place(seer, num_pages):
    """Two that do not fit together: guesses are made in what is left, and nobody is preempted for
    them."""
    plain, guessing = (
        Driver(limits(num_pages=num_pages, max_slots=8, step_tokens=32, guesses=count))
        for count in (0, 7)
    )
    for driver in (plain, guessing):
        submit(driver, range(5), 36)
        submit(driver, range(20, 25), 36)
        driver.run()
        driver.assert_all_as_alone()
    assert guesses(guessing)
    assert guessing.scheduler.stats().preemptions <= plain.scheduler.stats().preemptions


def test_prompts_come_first(seer):
    """A step that a prompt fills has no room for guesses."""
    driver = Driver(BOUNDS)
    submit(driver, range(5))
    while not guesses(driver):
        driver.turn()
    submit(driver, range(100, 160), 2)
    driver.run()
    beside = [
        plan
        for plan in driver.plans
        for work in plan.work
        if work.request_id == 2 and work.start + work.count < 60
    ]
    assert beside
    assert all(p.load.tokens == BOUNDS.step_tokens and not p.guesses for p in beside)


def test_each_kept_token_is_charged_as_a_step_of_its_own(seer):
    charged = []

    class Noting(FirstComeFirstServed):
        def charge(self, seq, tokens, elapsed_s):
            charged.append((seq.output_tokens, tokens, elapsed_s))

    seer.wrong_every = 4
    driver = Driver(BOUNDS, Noting())
    submit(driver, range(5))
    driver.run()
    assert [output for output, _, _ in charged] == list(range(40))
    assert sum(tokens for _, tokens, _ in charged) == 5 + 39
    assert sum(elapsed_s for *_, elapsed_s in charged) == pytest.approx(0.01 * len(driver.plans))


def test_those_who_wait_keep_their_pages(monkeypatch):
    met = 0

    class Watched(draft.Draft):
        def _guess(self):
            nonlocal met
            index = self._books.index
            kept = {keeper: index.kept(keeper) for keeper in index.keepers}
            guesses = super()._guess()
            assert {keeper: index.kept(keeper) for keeper in index.keepers} == kept
            met += bool(guesses) and bool(kept)
            return guesses

    monkeypatch.setattr(scheduler, "Draft", Watched)
    for seed in range(300):
        life = draw(random.Random(seed))
        replace(life, limits=replace(life.limits, guesses=7), vocab=2).live()
    assert met > 10


class TestWhatPays:
    def rate(self, cost, rows=1, **bounds):
        """Guesses per step and row, when it has got used to what is true."""
        driver = Driver(replace(BOUNDS, **bounds), cost=cost.copy())
        for row in range(rows):
            submit(driver, range(row * 7, row * 7 + 5), 90)
        while driver.scheduler.live:
            for plan, _ in list(driver.in_flight)[:1]:
                driver.step_s = cost.step_s(plan.load)
            driver.turn()
        driver.assert_all_as_alone()
        decodes = [plan for plan in driver.plans[2:-2] if len(plan.work) == rows]
        return sum(plan.guesses for plan in decodes) / len(decodes) / rows

    def test_as_many_as_are_free(self, seer):
        cost = CostModel([0.05, 0.4], (4, 16), 0.0, 0.0)
        assert 2.5 < self.rate(cost) <= 3

    def test_as_many_as_are_cheap(self, seer):
        cost = CostModel([0.05, 0.08], (4, 16), 1e-4, 1e-4)
        assert self.rate(cost) > 5

    def test_none_where_a_token_costs_as_much_as_a_step(self, seer):
        assert self.rate(CostModel([1e-5], (1,), 0.05, 0.05)) == 0

    def test_none_where_all_slots_are_taken(self, seer):
        cost = CostModel([0.05], (64,), 0.0, 0.0)
        assert self.rate(cost, rows=8) == 0
        assert self.rate(cost, rows=2) > 2

    def test_none_where_rows_are_many_and_tokens_cost(self, seer):
        cost = CostModel([0.004], (1,), 0.004, 0.004)
        assert self.rate(cost, rows=1) > 0
        assert self.rate(cost, rows=6, step_tokens=64, max_slots=32) == 0

    def test_what_a_step_is_found_to_cost_counts(self, seer):
        """The model says that guesses are free, and they take twice the step."""
        driver = Driver(BOUNDS, cost=CostModel([0.01], (64,), 0.0, 0.0))
        for prompt in range(9):
            submit(driver, range(prompt, prompt + 5), 100)
            while driver.scheduler.live:
                for plan, _ in list(driver.in_flight)[:1]:
                    driver.step_s = 0.01 + 0.015 * plan.guesses
                driver.turn()
        driver.assert_all_as_alone()
        early, late = driver.plans[:20], driver.plans[-300:]
        assert any(plan.guesses for plan in early)
        assert sum(plan.guesses > 0 for plan in late) < 10

    def test_an_idle_device_counts(self, seer, monkeypatch):
        """What is lost while tokens are waited for may be more than guesses win."""
        driver = Driver(BOUNDS, cost=CostModel([0.01], (64,), 0.0, 0.0))
        seer.wrong_every = 3
        monkeypatch.setattr(seer, "chance", 0.6)
        submit(driver, range(5), 100)
        while driver.scheduler.live:
            before = len(driver.in_flight)
            driver.turn()
            if before and not driver.in_flight:
                driver.now += 0.02
        driver.assert_all_as_alone()
        assert any(plan.guesses for plan in driver.plans[:20])
        assert not any(plan.guesses for plan in driver.plans[-20:])

    def test_time_without_requests_does_not_count(self, seer):
        driver = Driver(BOUNDS)
        for prompt in range(4):
            before = len(driver.plans)
            submit(driver, range(prompt, prompt + 5))
            driver.run()
            assert any(plan.guesses for plan in driver.plans[before:])
            driver.now += 100.0
