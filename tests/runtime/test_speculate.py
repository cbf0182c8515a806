"""Guesses on a real model: whatever is guessed, tokens, log-probabilities and endings are those of
the same requests without guesses. float32, so equality is exact where it is said to be."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from fastserve_jax.core import speculate
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.lookup import Lookup
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import DoneEvent, Request, Sampling, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.step import StepShape
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner

BOUNDS = {"max_slots": 16, "step_tokens": 32, "max_context": 96, "page_size": 4, "num_pages": 300}
GUESSES = 7
# A head of its own: a tied one with random weights repeats its last token for ever.
CONFIG = replace(FAMILIES["gemma3"], tied_head=False)
RULES = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.7, "seed": 5, "top_p": 0.9},
    "cold": {"temperature": 0.05, "seed": 6, "top_k": 8},
    "penalised": {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
    "scored": {"temperature": 0.0, "logprobs": 3},
    "biased": {"temperature": 0.0, "logit_bias": ((5, 2.0), (7, -3.0))},
    "stopped": {
        "temperature": 0.0,
        "stop_ids": frozenset(range(0, 97, 13)),
        "min_tokens": 11,
    },
}


@pytest.fixture(scope="module")
def runner():
    shape = StepShape(**BOUNDS, host_pages=240, guesses=GUESSES)
    with build_runner(CONFIG, shape)[0] as runner:
        yield runner


def request(name, index=0, max_tokens=48):
    """A prompt that repeats itself, so that there is something to guess from the beginning."""
    words = np.random.default_rng(index).integers(0, 97, 5).tolist()
    return tuple(words * 3)[: 11 + index], Sampling(max_tokens=max_tokens, **RULES[name])


def make(runner, guesses, *, overlap=True, policy="fcfs", num_pages=300):
    bounds = {**BOUNDS, "num_pages": num_pages}
    limits = Limits(**bounds, host_pages=240, guesses=guesses)
    cost = CostModel([1.0], page_out_s=1e-6, page_in_s=1e-6)  # guesses cost nothing
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost)
    return scheduler, Engine(scheduler, runner, overlap=overlap)


async def events_of(engine, prompt, rules):
    async with engine.stream(Request(engine.new_id(), prompt, rules)) as events:
        return [event async for event in events if isinstance(event, TokenEvent | DoneEvent)]


def answers(runner, requests, guesses, **how):
    """Events of each request, all asked at once, and the numbers of the scheduler."""

    async def run():
        scheduler, engine = make(runner, guesses, **how)
        async with engine:
            got = await asyncio.gather(*(events_of(engine, *asked) for asked in requests))
            await engine.drain()
        scheduler.check()
        return got, scheduler.stats()

    with CompileCounter() as counter:
        got, stats = asyncio.run(run())
    assert counter.compiles == 0
    assert stats.pages_used == 0
    return got, stats


def said(events):
    """All but the request's number; log-probabilities to what sums in another order may change."""
    tokens = [event.token for event in events[:-1]]
    assert isinstance(events[-1], DoneEvent)
    return tokens, events[-1].reason, events[-1].output_tokens


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert said(a) == said(b)
        for one, other in zip(a[:-1], b[:-1], strict=True):
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
                assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


class Seer(Lookup):
    """Guesses what the same request was answered without guesses, and errs at times."""

    futures: dict[tuple[int, ...], list[int]] = {}  # noqa: RUF012

    def __init__(self, tokens, given, odds):
        super().__init__(tokens, given, odds)
        self.whole = [*tokens[:given], *self.futures[tuple(tokens[:given])], *[0] * 9]
        self.known = tokens

    @property
    def expects(self):
        return True

    def guess(self, count):
        start = len(self.known)
        return tuple((self.whole[at] + (at % 5 == 0)) % 97 for at in range(start, start + count))

    def chances(self, count):
        return [0.9] * count


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_one_alone(runner, monkeypatch, name, overlap):
    asked = [request(name)]
    want, plain = answers(runner, asked, 0)
    monkeypatch.setattr(speculate, "Lookup", Seer)
    monkeypatch.setattr(Seer, "futures", {asked[0][0]: said(want[0])[0]})
    got, stats = answers(runner, asked, GUESSES, overlap=overlap)
    assert plain.guessed_tokens == 0
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
    assert stats.steps < plain.steps
    assert_equal(got, want)


@pytest.mark.parametrize("name", ["greedy", "cold", "scored"])
def test_from_its_own_text(runner, name):
    """Nobody knows the answer: repeated prompts and what the model repeats are guessed from."""
    got, want = (
        answers(runner, [request(name, index)], guesses)
        for index in (1,)
        for guesses in (GUESSES, 0)
    )
    assert got[1].guessed_tokens > 0
    assert_equal(got[0], want[0])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("policy", "num_pages"), [("fcfs", 300), ("fcfs", 40), ("mlfq", 40), ("adaptive", 40)]
)
def test_many_together_in_a_tight_pool(runner, monkeypatch, policy, num_pages, overlap):
    asked = [request(name, index) for index, name in enumerate([*RULES] * 2)]
    want, _ = answers(runner, asked, 0)
    monkeypatch.setattr(speculate, "Lookup", Seer)
    futures = {prompt: said(answer)[0] for (prompt, _), answer in zip(asked, want, strict=True)}
    monkeypatch.setattr(Seer, "futures", futures)
    how = {"overlap": overlap, "policy": policy, "num_pages": num_pages}
    got, stats = answers(runner, asked, GUESSES, **how)
    assert 0 < stats.accepted_tokens < stats.guessed_tokens
    assert (stats.preemptions > 0) == (num_pages < 300)
    assert_equal(got, want)
