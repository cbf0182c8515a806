"""A draft model beside a real model: whatever it says, tokens, log-probabilities and endings are
those of the same requests without it. float32, so equality is exact where it is said to be."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.lookup import Lookup
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.proposal import DraftCost
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import Admission, Ask, AskRow, Plan, Request, Sampling, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.drafter import DraftShape
from fastserve_jax.runtime.step import StepShape
from tests.models.families import FAMILIES
from tests.runtime.build import build_drafter, build_runner
from tests.runtime.test_speculate import (
    BOUNDS,
    CONFIG,
    GUESSES,
    RULES,
    assert_equal,
    events_of,
    said,
)

SHAPE = StepShape(**BOUNDS, host_pages=240, guesses=GUESSES)
ROWS = 3  # fewer than sequences: rows change hands
BIAS = ((5, 50.0),)  # the answer is all fives
OTHER = replace(FAMILIES["llama"], tied_head=False)


@pytest.fixture(scope="module")
def itself():
    """A model that drafts for itself."""
    yield from drafted(CONFIG)


@pytest.fixture(scope="module")
def other():
    """Another one, which knows nothing of it."""
    yield from drafted(OTHER, seed=1)


def drafted(config, seed=0):
    drafter = build_drafter(config, DraftShape(ROWS, 96, 4, 16, 96, 32), seed=seed)
    runner, _ = build_runner(CONFIG, SHAPE, drafter=drafter)
    with runner:
        yield runner


class Noting:
    """The runner, and what the draft model was asked and said."""

    def __init__(self, runner):
        self._runner = runner
        self.asked, self.said = [], []

    def dispatch(self, plan):
        return self._runner.dispatch(plan)

    async def propose(self, ask):
        self.asked.append(ask)
        self.said.append(await self._runner.propose(ask))
        return self.said[-1]


def request(name, index=0, max_tokens=48):
    """A prompt in which nothing repeats."""
    words = np.random.default_rng(index).permutation(97)[: 7 + 3 * index]
    return tuple(words.tolist()), Sampling(max_tokens=max_tokens, **RULES[name])


def make(runner, drafts, *, overlap=True, policy="fcfs", num_pages=300):
    guessing = {"guesses": GUESSES, "drafts": drafts, "draft_context": 96} if drafts else {}
    limits = Limits(**{**BOUNDS, "num_pages": num_pages}, host_pages=240, **guessing)
    cost = CostModel([1.0], page_out_s=1e-6, page_in_s=1e-6)  # guesses cost nothing
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost, DraftCost(1e-3, 1e-5))
    return scheduler, Engine(scheduler, runner, overlap=overlap)


def answers(runner, requests, drafts, *, at_once=99, leaves=(), **how):
    """Events of each request, `at_once` of them at a time, the numbers of the scheduler, and what
    was noted. Those in `leaves` go after five tokens."""
    noting = Noting(runner)

    async def one(engine, index, turns):
        async with turns:
            if index not in leaves:
                return await events_of(engine, *requests[index])
            prompt, rules = requests[index]
            async with engine.stream(Request(engine.new_id(), prompt, rules)) as events:
                seen = 0
                async for event in events:
                    seen += isinstance(event, TokenEvent)
                    if seen == 5:
                        return None

    async def run():
        scheduler, engine = make(noting, drafts, **how)
        turns = asyncio.Semaphore(at_once)
        async with engine:
            got = await asyncio.gather(*(one(engine, i, turns) for i in range(len(requests))))
            await engine.drain()
        scheduler.check()
        return got, scheduler.stats()

    with CompileCounter() as counter:
        got, stats = asyncio.run(run())
    assert counter.compiles == 0
    assert stats.pages_used == 0
    return got, stats, noting


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["greedy", "cold", "scored", "biased", "stopped"])
def test_one_that_knows_is_nearly_always_right(itself, name, overlap):
    asked = [request(name)]
    want, plain, _ = answers(itself, asked, 0)
    got, stats, noting = answers(itself, asked, ROWS, overlap=overlap)
    assert_equal(got, want)
    assert noting.asked
    if name in ("greedy", "cold", "scored"):  # the others' tokens are not the model's best
        assert stats.accepted_tokens > 0.9 * stats.guessed_tokens
        assert stats.steps < plain.steps / 3


@pytest.mark.parametrize("name", ["drawn", "penalised"])
def test_what_is_drawn_stays_what_it_is(itself, name):
    asked = [request(name, index) for index in range(3)]
    want, _, _ = answers(itself, asked, 0)
    got, _, noting = answers(itself, asked, ROWS)
    assert_equal(got, want)
    assert noting.asked


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("policy", "num_pages"), [("fcfs", 300), ("fcfs", 40), ("mlfq", 40), ("adaptive", 40)]
)
def test_many_together_in_a_tight_pool(itself, policy, num_pages, overlap):
    asked = [request(name, index) for index, name in enumerate(RULES)]
    how = {"overlap": overlap, "policy": policy, "num_pages": num_pages}
    want, plain, _ = answers(itself, asked, 0, **how)
    got, stats, noting = answers(itself, asked, ROWS, **how)
    assert_equal(got, want)
    assert noting.asked
    assert stats.accepted_tokens > 0.5 * stats.guessed_tokens > 0
    assert (plain.preemptions > 0) == (num_pages < 300)


def test_slots_change_hands_and_some_leave(itself):
    asked = [request("greedy", index % 8, 20 + index) for index in range(24)]
    want, _, _ = answers(itself, asked, 0)
    got, stats, _ = answers(itself, asked, ROWS, at_once=5, leaves=range(0, 24, 3))
    kept = [index for index in range(24) if index % 3]
    assert_equal([got[index] for index in kept], [want[index] for index in kept])
    assert stats.accepted_tokens > 0.9 * stats.guessed_tokens > 0


def test_long_prompts_are_read_in_parts(itself):
    asked = [(tuple(range(80)), Sampling(16, temperature=0.0))]
    want, _, _ = answers(itself, asked, 0)
    got, stats, noting = answers(itself, asked, ROWS)
    assert_equal(got, want)
    assert max(proposed.ran for proposed in noting.said) >= BOUNDS["step_tokens"]
    behind = [behind for proposed in noting.said for behind in proposed.behind.values()]
    assert max(behind) > 0
    assert behind[-1] == 0
    assert stats.accepted_tokens > 0.9 * stats.guessed_tokens > 0


def test_one_that_knows_nothing_is_asked_no_more(other, monkeypatch):
    monkeypatch.setattr(Lookup, "expects", False)
    asked = [request("greedy", index % 8, 60) for index in range(10)]
    want, _, _ = answers(other, asked, 0)
    got, stats, noting = answers(other, asked, ROWS, at_once=1)
    assert_equal(got, want)
    assert stats.proposed_tokens > 0
    tokens = sum(len(answer[:-1]) for answer in got)
    assert len(noting.asked) < tokens / 5
    assert stats.accepted_tokens < stats.proposed_tokens / 4


def test_texts_that_repeat_themselves_need_no_draft_model(itself):
    """What has been said before is free."""
    asked = [(tuple(range(5)) * 8, Sampling(40, temperature=0.0, logit_bias=BIAS))]
    want, _, _ = answers(itself, asked, 0)
    got, stats, noting = answers(itself, asked, ROWS)
    assert_equal(got, want)
    assert stats.accepted_tokens > 0.7 * stats.guessed_tokens > 0
    assert stats.proposed_tokens < stats.accepted_tokens / 3
    assert len(noting.asked) < 4


def test_what_it_ran_is_cut_back_to_what_holds(itself):
    """Its keys behind a wrong token are run again: what it says next is what it says of a text that
    it reads from the beginning."""
    prompt, rules = request("drawn")
    _, _, noting = answers(itself, [(prompt, rules)], ROWS)
    got = said(answers(itself, [(prompt, rules)], 0)[0][0])[0]
    text = [*prompt, *got]
    assert len(noting.asked) > 3
    for ask, proposed in zip(noting.asked, noting.said, strict=True):
        (row,) = ask.rows
        greedy = Sampling(row.count, temperature=0.0)
        best = said(answers(itself, [(tuple(text[: row.known]), greedy)], 0)[0][0])[0]
        assert list(proposed.tokens[row.request_id]) == best


def test_only_what_has_agreed_is_taken_to_hold(itself):
    """Other tokens came than it ran, or another sequence has the slot: nobody tells it but so."""
    texts = np.random.default_rng(5).integers(0, 97, (2, 60))
    drafter, rules = itself._drafter, Sampling(9, temperature=0.0)

    def keys(text, known, agreed, count):
        """Of the first 32 tokens, where it keeps them."""
        admission = Admission(0, 0, tuple(texts[text].tolist()), 60, rules)
        itself.run(Plan(0, (admission,), ()))
        itself.run_ask(Ask((AskRow(0, 0, known, agreed, count),)))
        pages = drafter._pages[drafter._row_of[0]][: 32 // SHAPE.page_size]
        return np.stack([np.asarray(layer)[pages] for layer in drafter._kv_pages])

    anew, other = keys(0, 32, 0, 2), keys(1, 32, 0, 2)
    astray = keys(0, 12, 0, 20)  # what it says is not what comes
    assert not np.allclose(astray, anew, atol=0.1)
    assert np.allclose(keys(0, 32, 12, 2), anew, atol=1e-5)
    keys(0, 12, 0, 20)
    assert np.allclose(keys(1, 32, 0, 2), other, atol=1e-5)


def test_rows_of_different_lengths_in_one_ask(itself):
    """One has all its tokens run but one, another is new, and a third does not fit beside it."""
    history = np.random.default_rng(3).integers(0, 97, (3, 60))
    rules = Sampling(9, temperature=0.0)
    given = [Admission(slot, slot, tuple(history[slot].tolist()), 60, rules) for slot in range(3)]
    itself.run(Plan(0, tuple(given), ()))
    first = itself.run_ask(Ask((AskRow(0, 0, 20, 0, 2),)))
    assert first.behind == {0: 0}
    rows = (AskRow(0, 0, 21, 20, 3), AskRow(1, 1, 12, 0, 4), AskRow(2, 2, 50, 0, 2))
    together = itself.run_ask(Ask(rows))
    assert together.behind == {0: 0, 1: 0, 2: 50 - (32 - 12 - 1)}
    assert {id: len(tokens) for id, tokens in together.tokens.items()} == {0: 3, 1: 4}
    # Known tokens stay as they are, so all can be run again from the beginning.
    for row in rows[:2]:
        alone = itself.run_ask(Ask((replace(row, agreed=0),)))
        assert alone.tokens[row.request_id] == together.tokens[row.request_id]
