"""Measures what steps cost before the first request, and fits the cost model to it.

Hand-written plans go through the runner's own programs, and a step is timed as the engine sees it:
from the plan to tokens on the host. Nothing is live, so any slot and any page may be written; the
admissions to come overwrite all that is left. Knows shapes and a clock, no model and no scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Protocol

from fastserve_jax.core.cost import QUERY_BLOCK, CostModel, StepLoad, fit
from fastserve_jax.core.types import Admission, Copies, Plan, Sampling, StepResult, Work

from .host import SIZES
from .step import StepShape

LONGEST = 1024  # tokens of a measured row: to read more takes more of the same
_FEWEST = 4  # steps measured whatever they take: decodes and a chunk, few tokens and many
_ROUNDS = 4  # over the steps
_TIMES = 5  # each number of pages is copied


class Runner(Protocol):
    @property
    def shape(self) -> StepShape: ...
    @property
    def platform(self) -> str: ...
    @property
    def page_bytes(self) -> int: ...
    def run(self, plan: Plan) -> StepResult: ...


def calibrate(
    runner: Runner, budget_s: float = 1.5, clock: Callable[[], float] = time.perf_counter
) -> CostModel:
    """Goes round the steps a few times, or until `budget_s` is over; some are run even then."""
    shape, until = runner.shape, clock() + budget_s

    def seconds(plan: Plan) -> float:
        began = clock()
        runner.run(plan)
        return clock() - began

    taken: list[tuple[Plan, list[float]]] = [(plan, []) for plan in _steps(shape)]
    runner.run(Plan(0, _everybody(shape), ()))
    runner.run(taken[0][0])  # waits for what the start left under way
    page_out_s = _page_s(shape, seconds, lambda copies: Plan(0, (), (), swap_out=copies))
    page_in_s = _page_s(shape, seconds, lambda copies: Plan(0, (), (), swap_in=copies))
    for count, (plan, times) in enumerate(taken * _ROUNDS):
        if count >= _FEWEST and clock() >= until:
            break
        times.append(seconds(plan))
    # A program's first run is slower, and counts only where there was no second.
    known = [(plan.load, median(times[1:] or times)) for plan, times in taken if times]
    overlaps = runner.platform != "cpu"
    model = fit(known, shape.token_buckets, overlaps=overlaps, page_bytes=runner.page_bytes)
    return replace(model, page_out_s=page_out_s, page_in_s=page_in_s)


def _everybody(shape: StepShape) -> tuple[Admission, ...]:
    rules = Sampling(max_tokens=1)
    return tuple(Admission(slot, slot, (0,), 1, rules) for slot in range(shape.max_slots))


def _page_s(
    shape: StepShape, seconds: Callable[[Plan], float], plan: Callable[[Copies], Plan]
) -> float:
    """By how much one more page lengthens a copy: a step has its dispatch anyway."""
    pages = min(shape.host_pages, shape.num_pages)
    if not pages:
        return 0.0
    few, many = min(SIZES[-1], pages), min(3 * SIZES[-1], pages)
    times = [
        median(seconds(plan(tuple((page, page) for page in range(count)))) for _ in range(_TIMES))
        for count in (few, many)
    ]
    return max(0.0, (times[1] - times[0]) / (many - few) if many > few else times[0] / few)


def _steps(shape: StepShape) -> Iterator[Plan]:
    """Those that tell most first. Each bucket of tokens is filled by decodes and by a chunk, and
    both are met with much and with little to read."""
    slots, tokens = shape.max_slots, shape.step_tokens
    yield _step(shape, [(1, 1)])
    yield _step(shape, [(tokens, tokens)])
    yield _step(shape, [(1, 1)] * slots)
    yield _step(shape, [(1, LONGEST)] * slots)
    yield _step(shape, [(tokens, LONGEST)])
    yield _step(shape, [(1, LONGEST)])
    for bucket in shape.token_buckets[:-1]:
        yield _step(shape, [(bucket, bucket)])
        if bucket < slots:
            yield _step(shape, [(1, LONGEST // 4)] * bucket)
    if tokens > slots // 2 + 1:
        decodes = [(1, LONGEST // 4)] * (slots // 2)
        yield _step(shape, [*decodes, (tokens - len(decodes), LONGEST // 4)])


def _step(shape: StepShape, rows: list[tuple[int, int]]) -> Plan:
    """One row for each (tokens to run, length with them), in pages of its own."""
    own = shape.num_pages // len(rows)
    longest = min(10**6, max(own, 1) * shape.page_size)
    works, prefill_tokens, decode_rows, kv_tokens = [], 0, 0, 0
    for slot, (count, length) in enumerate(rows):
        count = min(count, longest)
        length = max(min(length, longest), count)
        pages = range(slot * own, slot * own + -(-length // shape.page_size))
        work = Work(slot, slot, length - count, count, 0, tuple(pages), samples=True)
        works.append(work)
        prefill_tokens += count if count > 1 else 0
        decode_rows += count == 1
        kv_tokens += length * -(-count // QUERY_BLOCK)
    return Plan(0, (), tuple(works), load=StepLoad(prefill_tokens, decode_rows, kv_tokens))
