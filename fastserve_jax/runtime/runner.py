"""Carries out a Plan: the one place where a plan's ints meet the device's arrays.

Programs are dispatched from the caller's thread, which costs about as much as building their
arguments; one worker thread waits for results. Every step's arguments are fresh numpy arrays: the
CPU backend may alias them, and a reused buffer would change a step in flight. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fastserve_jax.core.types import (
    Admission,
    Ask,
    Plan,
    Proposed,
    Sampled,
    Sampling,
    Scored,
    StepResult,
    TopLogprobs,
    Work,
)
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Batch, State, head_of

from . import sampling
from .drafter import Drafter, Drafting
from .host import HostTier
from .sampling import Drawn
from .step import Rows, Scores, StepShape


@dataclass(frozen=True, slots=True)
class _Given:
    """What a slot's results must be shaped by."""

    prompt_tokens: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class _Pending:
    """A dispatched step: device arrays, and which request each row belongs to."""

    done: jax.Array | None  # there when all else is; None: nothing was to be done
    drawn: Drawn | None
    sampled: tuple[tuple[int, Sampling], ...]  # request and rules, by row of `drawn`
    scores: Scores | None
    scored: tuple[tuple[int, int, int], ...]  # request, position, alternatives, by row of `scores`


class DeviceRunner:
    """Owns pages, slots and parameters on the device, and the host pages. A context manager."""

    def __init__(
        self,
        config: ModelConfig,
        params: State,
        kv_pages: list[jax.Array],
        shape: StepShape,
        programs: Mapping[str, jax.stages.Compiled],
        host_pages: jax.Array | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        assert (host_pages is not None) == (shape.host_pages > 0)
        self.shape = shape
        self._params, self._programs = jax.tree.leaves(params), programs
        self._config = config
        self._head = head_of(config, params)
        self._kv_pages = kv_pages  # donated to every step
        self._drafter = drafter
        self._host = None if host_pages is None else HostTier(host_pages, programs)
        self._state = sampling.empty_state(shape.max_slots, shape.max_context, config.vocab_size)
        self._page_table = np.zeros((shape.max_slots, shape.pages_per_row), np.int32)
        self._given: dict[int, _Given] = {}  # by slot
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="device")

    def __enter__(self) -> DeviceRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiter.shutdown()

    @property
    def platform(self) -> str:
        return str(next(iter(self._head.weight.devices())).platform)

    @property
    def page_bytes(self) -> int:
        return sum(pages.nbytes for pages in self._kv_pages) // self.shape.num_pages

    def dispatch(self, plan: Plan) -> Awaitable[StepResult]:
        pending = self._start(plan)
        return asyncio.get_running_loop().run_in_executor(self._waiter, _fetch, pending)

    def run(self, plan: Plan) -> StepResult:
        """`dispatch`, waited for: where no event loop runs."""
        return _fetch(self._start(plan))

    def propose(self, ask: Ask) -> Awaitable[Proposed]:
        """What the draft model says comes next, of sequences whose known tokens are all here."""
        drafting = self._draft(ask)
        return asyncio.get_running_loop().run_in_executor(self._waiter, _proposed, drafting)

    def run_ask(self, ask: Ask) -> Proposed:
        """`propose`, waited for."""
        return _proposed(self._draft(ask))

    def _draft(self, ask: Ask) -> Drafting:
        assert self._drafter is not None, "there is no draft model"
        history, drafting = self._drafter.draft(ask, self._state.history)
        self._state = self._state._replace(history=history)
        return drafting

    def _start(self, plan: Plan) -> _Pending:
        done = self._swap(plan)
        for admission in plan.admissions:
            self._admit(admission)
        if plan.guesses:
            self._guess(plan.work)
        return self._launch(plan.work) if plan.work else _Pending(done, None, (), None, ())

    def _swap(self, plan: Plan) -> jax.Array | None:
        done = None
        if plan.swap_out or plan.swap_in:
            assert self._host is not None, "there is no host tier"
            if plan.swap_out:
                done = self._host.swap_out(self._kv_pages, plan.swap_out)
            if plan.swap_in:  # reads what was swapped out, so it is done no sooner
                self._kv_pages, done = self._host.swap_in(self._kv_pages, plan.swap_in)
        return done

    def _admit(self, admission: Admission) -> None:
        row = sampling.slot_row(admission, self.shape.max_context, self._config.vocab_size)
        self._state = self._programs["admit"](self._state, np.int32(admission.slot), row)
        self._given[admission.slot] = _Given(admission.prompt_tokens, admission.sampling)

    def _guess(self, works: tuple[Work, ...]) -> None:
        """Forward reads its tokens in the histories, and sampling what stands before each."""
        rows = self.shape.row_buckets[-1]
        slots, positions, tokens = np.full((3, rows), self.shape.max_slots, np.int32)
        at = 0
        for work in works:
            if not work.guesses:
                continue
            end = at + len(work.guesses)
            slots[at:end], tokens[at:end] = work.slot, work.guesses
            positions[at:end] = range(work.start + 1, work.start + work.count)
            at = end
        history = self._programs["guess"](self._state.history, slots, positions, tokens)
        self._state = self._state._replace(history=history)

    def _launch(self, works: tuple[Work, ...]) -> _Pending:
        batch, tokens = self._batch(works)
        bucket = _bucket(self.shape.token_buckets, tokens)
        forward = self._programs[f"forward[{bucket}]"]
        self._kv_pages, hidden = forward(self._params, self._kv_pages, self._state.history, batch)
        # Scored first: drawing donates the history that scoring reads.
        scores, scored = self._score(works, batch, hidden)
        drawn, sampled = self._sample(works, batch, hidden)
        return _Pending(hidden, drawn, sampled, scores, scored)

    def _batch(self, works: tuple[Work, ...]) -> tuple[Batch, int]:
        rows = self.shape.max_slots
        slots, kv_lens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        cu_q_lens = np.zeros(rows + 1, np.int32)
        ones = tokens = 0
        for row, work in enumerate(works):
            end = work.first_page + len(work.pages)
            self._page_table[work.slot, work.first_page : end] = work.pages
            slots[row], kv_lens[row] = work.slot, work.start + work.count
            tokens += work.count
            cu_q_lens[row + 1] = tokens
            ones += work.count == 1
        cu_q_lens[len(works) + 1 :] = tokens
        distribution = np.array([ones, len(works)], np.int32)
        return Batch(slots, kv_lens, self._page_table[slots], cu_q_lens, distribution), tokens

    def _sample(
        self, works: tuple[Work, ...], batch: Batch, hidden: jax.Array
    ) -> tuple[Drawn | None, tuple[tuple[int, Sampling], ...]]:
        """One token behind the last known one, and one behind each guess."""
        ending = [
            (int(batch.cu_q_lens[row + 1]) - 1 - back, work.start + work.count - back, work)
            for row, work in enumerate(works)
            if work.samples
            for back in range(len(work.guesses), -1, -1)
        ]
        if not ending:
            return None, ()
        bucket = _bucket(self.shape.row_buckets, len(ending))
        rows = _empty_rows(bucket, self.shape.max_slots)
        for i, (at, position, work) in enumerate(ending):
            rows.hidden[i], rows.slots[i], rows.positions[i] = at, work.slot, position
        sample = self._programs[f"sample[{bucket}]"]
        self._state, drawn = sample(self._head, self._state, hidden, rows)
        return drawn, tuple((w.request_id, self._given[w.slot].sampling) for *_, w in ending)

    def _score(
        self, works: tuple[Work, ...], batch: Batch, hidden: jax.Array
    ) -> tuple[Scores | None, tuple[tuple[int, int, int], ...]]:
        """Every prompt token that follows one of this step's, where the request asked for it."""
        rows = _empty_rows(self.shape.step_tokens, 0)
        scored: list[tuple[int, int, int]] = []
        for row, work in enumerate(works):
            given = self._given[work.slot]
            if given.sampling.prompt_logprobs is None:
                continue
            first = int(batch.cu_q_lens[row])
            for i in range(min(work.count, given.prompt_tokens - 1 - work.start)):
                at, position = len(scored), work.start + i + 1
                rows.hidden[at], rows.slots[at], rows.positions[at] = first + i, work.slot, position
                scored.append((work.request_id, position, given.sampling.prompt_logprobs))
        if not scored:
            return None, ()
        score, history = self._programs["score"], self._state.history
        scores = score(self._head, history, hidden, rows, np.int32(len(scored)))
        return scores, tuple(scored)


def _bucket(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


def _empty_rows(count: int, slot: int) -> Rows:
    return Rows(
        np.zeros(count, np.int32), np.full(count, slot, np.int32), np.zeros(count, np.int32)
    )


def _fetch(pending: _Pending) -> StepResult:
    """On the worker thread: wait for the step, and turn its arrays into plain values."""
    drawn: dict[int, list[Sampled]] = {}
    scored: dict[int, list[Scored]] = {}
    if pending.drawn is None:
        if pending.done is not None:
            pending.done.block_until_ready()
    else:
        tokens = np.asarray(pending.drawn.tokens).tolist()
        wanted = any(rules.logprobs is not None for _, rules in pending.sampled)
        lists = _lists(pending.drawn[1:]) if wanted else ()
        for row, (request_id, rules) in enumerate(pending.sampled):
            token = tokens[row] if tokens[row] >= 0 else None
            sampled = Sampled(token)
            if rules.logprobs is not None and token is not None:
                sampled = Sampled(token, *_logprobs(lists, row, rules.logprobs))
            drawn.setdefault(request_id, []).append(sampled)
    if pending.scores is not None:
        lists = _lists(pending.scores)
        for row, (request_id, position, count) in enumerate(pending.scored):
            logprob, top = _logprobs(lists, row, count)
            scored.setdefault(request_id, []).append(Scored(position, logprob, top))
    return StepResult(
        {request_id: first for request_id, (first, *_) in drawn.items()},
        {request_id: tuple(s) for request_id, s in scored.items()},
        {request_id: tuple(rest) for request_id, (_, *rest) in drawn.items() if rest},
    )


def _proposed(drafting: Drafting) -> Proposed:
    """On the worker thread, like `_fetch`."""
    tokens: dict[int, tuple[int, ...]] = {}
    for run, request_ids in drafting.runs:
        for request_id, token in zip(request_ids, np.asarray(run).tolist(), strict=False):
            tokens[request_id] = (*tokens.get(request_id, ()), token)
    return Proposed(tokens, drafting.behind, len(drafting.runs), drafting.ran)


def _lists(arrays: tuple[jax.Array, ...]) -> tuple[list[Any], ...]:
    return tuple(np.asarray(array).tolist() for array in arrays)


def _logprobs(lists: tuple[list[Any], ...], row: int, count: int) -> tuple[float, TopLogprobs]:
    logprobs, top_ids, top_logprobs = lists
    top = zip(top_ids[row][:count], top_logprobs[row][:count], strict=True)
    return logprobs[row], tuple((token, logprob) for token, logprob in top if token >= 0)
