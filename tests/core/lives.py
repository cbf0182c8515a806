"""Lives of a scheduler: requests of all kinds come, go and wait; and how one is lived and judged.

tests/core/test_lives.py draws them with hypothesis and in a fixed batch, bench/lives.py by the
thousand.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.mlfq import SkipJoinMLFQ
from fastserve_jax.core.policy import POLICIES, Policy
from fastserve_jax.core.scheduler import Limits
from fastserve_jax.errors import InvalidRequest, Overloaded
from tests.core.driver import Driver
from tests.fakes import VOCAB

NAMES = (*POLICIES, "eager", "adaptive", "mlfq")  # what matters most is drawn more often
COSTS = {
    "cheap": CostModel(page_out_s=1e-6, page_in_s=1e-6),
    "beside": CostModel(page_out_s=2e-5, page_in_s=2e-5, overlaps=True),
    "learned": CostModel([0.009], page_out_s=1e-5, page_in_s=1e-5),  # near what a step takes
    "slow": CostModel([0.009], (1,), 2e-3, 1e-4, page_out_s=1e-3, page_in_s=1e-3),
    "never": CostModel(page_out_s=1.0, page_in_s=1.0),
}
GUESSES = (0, 1, 3, 7)
VOCABS = (VOCAB, 2)  # of two tokens texts repeat themselves by chance, and guesses are wrong by it


@dataclass(frozen=True)
class Ask:
    shared: int  # tokens of one common beginning
    own: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline_s: float | None = None
    prompt_logprobs: int | None = None
    client: str = ""
    session: str = ""

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
                client=self.client,
                session=self.session,
            )
        except (InvalidRequest, Overloaded):
            driver.scheduler.check()


Move = Ask | str | tuple[str, float]  # "turn", "plan", "commit", ("cancel", id), ("wait", seconds)


@dataclass(frozen=True)
class Life:
    limits: Limits
    policy: str
    overlap: int
    script: tuple[Move, ...]
    nan: frozenset[tuple[int, int]] = frozenset()
    cost: str = "cheap"
    vocab: int = VOCAB

    def live(self) -> Driver:
        parts = self.limits, self.policy, self.overlap, self.script
        return live(*parts, nan=self.nan, cost=self.cost, vocab=self.vocab)


def policy(name: str, limits: Limits) -> str | Policy:
    """`eager` demotes and promotes at almost every step."""
    if name == "eager":
        cost = CostModel([0.0], (1,), 1.0, 1.0)
        return SkipJoinMLFQ(limits, cost, quantum_s=0.01, starve_s=0.05, levels=5)
    return name


def live(
    limits: Limits,
    name: str,
    overlap: int,
    script: Iterable[Move],
    nan: Collection[tuple[int, int]] = (),
    cost: str = "cheap",
    vocab: int = VOCAB,
    replicas: int = 1,
) -> Driver:
    """Live it to its end; AssertionError where anything is lost, wrong, or never comes."""
    costs = COSTS[cost].copy()
    named = policy(name, limits)
    how = {"overlap": overlap, "nan": nan, "cost": costs, "vocab": vocab}
    driver = Driver(limits, named, replicas=replicas, **how)
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
                driver.cancel(int(request_id))
            case ("wait", seconds):
                driver.now += seconds
                driver.expire()
    driver.run()
    driver.scheduler.check()
    assert driver.done.keys() == driver.requests.keys()
    driver.assert_all_as_alone()
    return driver


def draw(rng: random.Random) -> Life:
    """Any life; crowded more often than not."""
    slots = rng.randint(1, 5)
    limits = Limits(
        page_size=rng.choice([1, 2, 4]),
        num_pages=rng.randint(4, 36),
        host_pages=rng.choice([0, 3, 9, 80]),
        max_slots=slots,
        step_tokens=slots + rng.randint(0, 12),
        max_context=40,
        max_queue=8,
    )
    nan = {(rng.randint(1, 8), rng.randint(0, 6)) for _ in range(rng.choice([0, 0, 0, 3]))}
    script = tuple(_move(rng) for _ in range(rng.randint(4, 60)))
    overlap, cost, name = rng.randint(0, 1), rng.choice(list(COSTS)), rng.choice(NAMES)
    limits = replace(limits, guesses=rng.choice(GUESSES))
    return Life(limits, name, overlap, script, frozenset(nan), cost, rng.choice(VOCABS))


def _move(rng: random.Random) -> Move:
    kind = rng.random()
    if kind < 0.3:
        return Ask(
            shared=rng.choice([0, 0, 5, 9, 16]),
            own=tuple(rng.randrange(VOCAB) for _ in range(rng.randint(0, 8))),
            max_tokens=rng.randint(0, 14),
            seed=rng.randint(0, 2),
            stop_ids=frozenset(rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 2]))),
            priority=rng.choice([0, 0, 0, 1, -1]),
            deadline_s=rng.choice([None, None, None, 0.5]),
            prompt_logprobs=rng.choice([None, None, 0]),
            client=rng.choice(["", "a", "b"]),
            session=rng.choice(["", "", "s"]),
        )
    if kind < 0.9:
        return rng.choice(["turn", "turn", "turn", "plan", "commit"])
    if kind < 0.95:
        return "cancel", rng.randint(1, 12)
    return "wait", rng.choice([0.01, 0.1, 1.0])
