"""Random lives: whatever is asked, everybody gets what it would get alone, and nothing is lost."""

from dataclasses import dataclass

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.mlfq import SkipJoinMLFQ
from fastserve_jax.core.policy import POLICIES
from fastserve_jax.core.scheduler import Limits
from fastserve_jax.core.types import Finish
from fastserve_jax.errors import InvalidRequest, Overloaded
from tests.core.driver import Driver
from tests.fakes import VOCAB


@dataclass(frozen=True)
class Ask:
    shared: int  # tokens of one common beginning
    own: tuple[int, ...]
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    priority: int
    deadline_s: float | None
    prompt_logprobs: int | None

    def submit(self, driver: Driver) -> None:
        common = [position * 7 % VOCAB for position in range(self.shared)]
        deadline = None if self.deadline_s is None else driver.now + self.deadline_s
        try:
            driver.submit(
                [*common, *self.own],
                self.max_tokens,
                seed=self.seed,
                stop_ids=self.stop_ids,
                priority=self.priority,
                deadline=deadline,
                prompt_logprobs=self.prompt_logprobs,
            )
        except (InvalidRequest, Overloaded):
            driver.scheduler.check()


asks = st.builds(
    Ask,
    shared=st.sampled_from([0, 0, 5, 9, 16]),
    own=st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple),
    max_tokens=st.integers(0, 14),
    seed=st.integers(0, 2),
    stop_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    deadline_s=st.sampled_from([None, None, None, 0.5]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)
moves = st.one_of(
    asks,
    asks,
    st.just("turn"),
    st.just("turn"),
    st.just("plan"),
    st.just("commit"),
    st.tuples(st.just("cancel"), st.integers(1, 12)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.1, 1.0])),
)
bounds = st.builds(
    lambda slots, spare, **rest: Limits(max_slots=slots, step_tokens=slots + spare, **rest),
    slots=st.integers(1, 5),
    spare=st.integers(0, 12),
    page_size=st.sampled_from([1, 2, 4]),
    num_pages=st.integers(4, 36),
    host_pages=st.sampled_from([0, 3, 9, 80]),
    max_context=st.just(40),
    max_queue=st.just(8),
)
policies = st.sampled_from([*POLICIES, "eager", "adaptive", "mlfq"])


def policy(name, limits):
    """`eager` demotes and promotes at almost every step."""
    if name == "eager":
        cost = CostModel([0.0], (1,), 1.0, 1.0)
        return SkipJoinMLFQ(limits, cost, quantum_s=0.01, starve_s=0.05, levels=5)
    return name


def live(limits, name, overlap, script, nan=()):
    driver = Driver(limits, policy(name, limits), overlap=overlap, nan=nan)
    for move in script:
        match move:
            case Ask():
                move.submit(driver)
            case "turn":
                driver.turn()
            case "plan":
                if len(driver.in_flight) < 2:
                    driver.plan()
            case "commit":
                if driver.in_flight:
                    driver.commit()
            case ("cancel", request_id):
                driver.cancel(request_id)
            case ("wait", seconds):
                driver.now += seconds
                driver.expire()
    driver.run()
    driver.scheduler.check()
    assert driver.done.keys() == driver.requests.keys()
    driver.assert_all_as_alone()
    return driver


calm = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


@calm
@given(bounds, policies, st.integers(0, 1), st.lists(moves, max_size=60))
def test_everybody_gets_what_it_gets_alone(limits, name, overlap, script):
    live(limits, name, overlap, script)


@calm
@given(bounds, policies, st.lists(asks, max_size=12))
def test_overlap_changes_no_token(limits, name, script):
    overlapped, plain = (live(limits, name, overlap, script) for overlap in (1, 0))
    assert overlapped.outputs == plain.outputs
    assert overlapped.scored == plain.scored


@calm
@given(bounds, policies, st.lists(moves, max_size=40))
def test_the_same_life_is_the_same_trace(limits, name, script):
    once, again = (live(limits, name, 1, script) for _ in range(2))
    assert once.plans == again.plans


@calm
@given(
    bounds,
    policies,
    st.lists(moves, max_size=40),
    st.sets(st.tuples(st.integers(1, 8), st.integers(0, 6)), max_size=4),
)
def test_bad_numbers_end_only_their_own_request(limits, name, script, nan):
    driver = live(limits, name, 1, script, nan)
    for request_id, done in driver.done.items():
        if done.reason is Finish.ERROR:
            assert (request_id, done.output_tokens) in nan


@calm
@given(bounds, policies, st.lists(asks, min_size=4, max_size=16))
@example(
    Limits(page_size=4, num_pages=8, max_slots=2, step_tokens=6, max_context=40),
    "eager",
    [Ask(0, (1, 2, 3, 4, 5, 6), 14, 0, frozenset(), 0, None, None)] * 8,
)
def test_nobody_starves(limits, name, script):
    """Turns stay within a small multiple of the work, however small the pool."""
    driver = Driver(limits, policy(name, limits))
    for ask in script:
        ask.submit(driver)
    tokens = sum(len(r.prompt) + r.sampling.max_tokens for r in driver.requests.values())
    for turn in range(60 + 12 * tokens):
        if not driver.scheduler.live:
            break
        driver.now += 0.01 * (turn % 3)
        driver.turn()
    assert not driver.scheduler.live, driver.scheduler.stats()
