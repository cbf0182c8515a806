"""Carries out a Plan: the one place where a plan's ints meet the device's arrays.

Programs are dispatched from the caller's thread, which costs about as much as building their
arguments; one worker thread waits for results. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from fastserve_jax.core.types import (
    Admission,
    Ask,
    Plan,
    Proposed,
    Sampled,
    Scored,
    StepResult,
    TopLogprobs,
    Work,
)
from fastserve_jax.models.adapters import Adapters
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Batch, State, head_of

from . import sampling
from .drafter import Drafter, Drafting
from .host import HostTier
from .lane import DrawnRows, Lane, ScoredRows
from .mesh import REPLICAS, alike, replicas_of
from .sampling import Drawn
from .shapes import stacked
from .step import Scores, StepShape

type Works = tuple[Work, ...]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A dispatched step: device arrays, and whose row each is, replica by replica."""

    done: jax.Array | None  # there when all else is; None: nothing was to be done
    drawn: Drawn | None
    sampled: tuple[DrawnRows, ...]  # by row of `drawn`
    scores: Scores | None
    scored: tuple[ScoredRows, ...]  # by row of `scores`


class Watcher(Protocol):
    """Told of every plan, in order, before it begins and when it has ended."""

    def begins(self, plan: Plan) -> None: ...
    def ends(self, result: StepResult) -> None: ...


class DeviceRunner:
    """Owns pages, slots and parameters on the device, and the host pages. A context manager.

    Over a mesh each replica carries out a plan of its own, all of them in one step; a plan that
    says nothing of replicas is everybody's.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: State,
        kv_pages: list[jax.Array],
        shape: StepShape,
        programs: Mapping[str, jax.stages.Compiled],
        host_pages: jax.Array | None = None,
        drafter: Drafter | None = None,
        mesh: Mesh | None = None,
        watcher: Watcher | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        assert (host_pages is not None) == (shape.host_pages > 0)
        self.shape = shape
        self._params, self._programs = jax.tree.leaves(params), programs
        self._head = head_of(config, params)
        self._kv_pages = kv_pages  # donated to every step
        self._drafter = drafter
        self._adapters = adapters
        self._host = None
        if host_pages is not None:
            self._host = HostTier(host_pages, shape.host_pages, shape.num_pages, programs)
        self._state = sampling.empty_state(shape.max_slots, shape.max_context, config.vocab_size)
        if mesh is not None:
            self._state = jax.tree.map(lambda x: alike(mesh, REPLICAS, x), self._state)
        self._lanes = [Lane(shape, config.vocab_size) for _ in range(replicas_of(mesh))]
        self._watcher = watcher
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="device")

    def __enter__(self) -> DeviceRunner:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the device's memory back, whoever may still know this object."""
        self._waiter.shutdown()
        self.__dict__.clear()

    @property
    def platform(self) -> str:
        return str(next(iter(self._head.weight.devices())).platform)

    @property
    def page_bytes(self) -> int:
        """Of one page of one replica."""
        held = self.shape.num_pages * len(self._lanes)
        return sum(pages.nbytes for pages in self._kv_pages) // held

    def dispatch(self, plan: Plan) -> Awaitable[StepResult]:
        return asyncio.get_running_loop().run_in_executor(self._waiter, self.begin(plan))

    def run(self, plan: Plan) -> StepResult:
        """`dispatch`, waited for: where no event loop runs."""
        return self.begin(plan)()

    def begin(self, plan: Plan) -> Callable[[], StepResult]:
        """Dispatches `plan`; what it returns waits for it, and is called in the same order."""
        if self._watcher is not None:
            self._watcher.begins(plan)
        return partial(self._finish, self._start(plan))

    def _finish(self, pending: _Pending) -> StepResult:
        result = _fetch(pending)
        if self._watcher is not None:
            self._watcher.ends(result)
        return result

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

    def adapt(self, index: int, adapter: Adapters) -> None:
        """Put `adapter`, whose width is one's rank, at `index`, from 1, for all plans to come. No
        sequence may use what was there."""
        assert 1 <= index <= self.shape.adapters.count, f"no place {index} for an adapter"
        self._adapters = self._programs["adapt"](self._adapters, np.int32(index), adapter)

    def _start(self, plan: Plan) -> _Pending:
        plans = plan.replicas or (plan,) * len(self._lanes)
        assert len(plans) == len(self._lanes), "a plan for each replica"
        done = self._swap(plans)
        for admissions in zip_longest(*(own.admissions for own in plans)):
            self._admit(admissions)
        works = [own.work for own in plans]
        if any(own.guesses for own in plans):
            self._guess(works)
        return self._launch(works) if any(works) else _Pending(done, None, (), None, ())

    def _swap(self, plans: Sequence[Plan]) -> jax.Array | None:
        done = None
        out, back = [own.swap_out for own in plans], [own.swap_in for own in plans]
        if any(out):
            assert self._host is not None, "there is no host tier"
            done = self._host.swap_out(self._kv_pages, out)
        if any(back):  # reads what was swapped out, so it is done no sooner
            assert self._host is not None, "there is no host tier"
            self._kv_pages, done = self._host.swap_in(self._kv_pages, back)
        return done

    def _admit(self, admissions: Sequence[Admission | None]) -> None:
        pairs = zip(self._lanes, admissions, strict=True)
        rows = [lane.admit_nobody() if who is None else lane.admit(who) for lane, who in pairs]
        self._state = self._programs["admit"](self._state, *stacked(rows))

    def _guess(self, works: Sequence[Works]) -> None:
        guesses = stacked([lane.guesses(own) for lane, own in self._with(works)])
        history = self._programs["guess"](self._state.history, *guesses)
        self._state = self._state._replace(history=history)

    def _with(self, works: Sequence[Works]) -> Iterator[tuple[Lane, Works]]:
        return zip(self._lanes, works, strict=True)

    def _launch(self, works: Sequence[Works]) -> _Pending:
        batches = [lane.batch(own) for lane, own in self._with(works)]
        tokens = max(int(batch.cu_q_lens[-1]) for batch in batches)
        bucket = _bucket(self.shape.token_buckets, tokens)
        kind, batch, history = "forward", stacked(batches), self._state.history
        given: tuple[Any, ...] = (self._params, self._kv_pages, history, batch)
        if self._adapters is not None:
            of_rows = stacked([lane.adapters(own) for lane, own in self._with(works)])
            if of_rows.any():
                kind, given = "adapted", (*given, self._adapters, of_rows)
        self._kv_pages, hidden = self._programs[f"{kind}[{bucket}]"](*given)
        # Scored first: drawing donates the history that scoring reads.
        scores, scored = self._score(works, batches, hidden)
        drawn, sampled = self._sample(works, batches, hidden)
        return _Pending(hidden, drawn, sampled, scores, scored)

    def _sample(
        self, works: Sequence[Works], batches: Sequence[Batch], hidden: jax.Array
    ) -> tuple[Drawn | None, tuple[DrawnRows, ...]]:
        both = zip(self._with(works), batches, strict=True)
        ends, sampled = zip(*(lane.drawn(own, batch) for (lane, own), batch in both), strict=True)
        if not any(sampled):
            return None, ()
        bucket = _bucket(self.shape.row_buckets, max(map(len, sampled)))
        rows = stacked([own.rows(bucket, self.shape.max_slots) for own in ends])
        sample = self._programs[f"sample[{bucket}]"]
        self._state, drawn = sample(self._head, self._state, hidden, rows)
        return drawn, sampled

    def _score(
        self, works: Sequence[Works], batches: Sequence[Batch], hidden: jax.Array
    ) -> tuple[Scores | None, tuple[ScoredRows, ...]]:
        both = zip(self._with(works), batches, strict=True)
        ends, scored = zip(*(lane.scored(own, batch) for (lane, own), batch in both), strict=True)
        if not any(scored):
            return None, ()
        rows = stacked([own.rows(self.shape.step_tokens, 0) for own in ends])
        count = stacked([np.int32(len(own)) for own in scored])
        history = self._state.history
        return self._programs["score"](self._head, history, hidden, rows, count), scored


def _bucket(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


def _fetch(pending: _Pending) -> StepResult:
    """On the worker thread: wait for the step, and turn its arrays into plain values."""
    drawn: dict[int, list[Sampled]] = {}
    scored: dict[int, list[Scored]] = {}
    if pending.drawn is None:
        if pending.done is not None:
            pending.done.block_until_ready()
    else:
        arrays = _of_each(pending.drawn, len(pending.sampled))
        for own, rows in zip(arrays, pending.sampled, strict=True):
            _sort_drawn(own, rows, drawn)
    if pending.scores is not None:
        arrays = _of_each(pending.scores, len(pending.scored))
        for own, places in zip(arrays, pending.scored, strict=True):
            lists = _lists(own)
            for row, (request_id, position, count) in enumerate(places):
                logprob, top = _logprobs(lists, row, count)
                scored.setdefault(request_id, []).append(Scored(position, logprob, top))
    return StepResult(
        {request_id: first for request_id, (first, *_) in drawn.items()},
        {request_id: tuple(s) for request_id, s in scored.items()},
        {request_id: tuple(rest) for request_id, (_, *rest) in drawn.items() if rest},
    )


def _sort_drawn(arrays: tuple[Any, ...], rows: DrawnRows, drawn: dict[int, list[Sampled]]) -> None:
    """Into lists by request."""
    tokens = np.asarray(arrays[0]).tolist()
    wanted = any(rules.logprobs is not None for _, rules in rows)
    lists = _lists(arrays[1:]) if wanted else ()
    for row, (request_id, rules) in enumerate(rows):
        token = tokens[row] if tokens[row] >= 0 else None
        sampled = Sampled(token)
        if rules.logprobs is not None and token is not None:
            sampled = Sampled(token, *_logprobs(lists, row, rules.logprobs))
        drawn.setdefault(request_id, []).append(sampled)


def _of_each(arrays: tuple[jax.Array, ...], replicas: int) -> list[tuple[Any, ...]]:
    """What of stacked arrays is each replica's."""
    if replicas == 1:
        return [arrays]
    whole = [np.asarray(array) for array in arrays]
    return [tuple(array[own] for array in whole) for own in range(replicas)]


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
