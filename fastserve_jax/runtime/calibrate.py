"""Measures what steps cost before the first request, and fits the cost model to it.

Hand-written plans go through the runner's own programs, and a step is timed as the engine sees it:
from the plan to tokens on the host. Nothing is live, so any slot and any page may be written; the
admissions to come overwrite all that is left. Knows shapes and a clock, no model and no scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Protocol

from fastserve_jax.core.cost import QUERY_BLOCK, CostModel, StepLoad, fit
from fastserve_jax.core.types import Admission, Plan, Sampling, StepResult, Work

from .host import SIZES
from .step import StepShape

LONGEST = 1024  # tokens of a measured row: to read more takes more of the same
_FEWEST = 4  # steps measured whatever they take: decodes and a chunk, few tokens and many
_ROUNDS = 4  # over the steps
_COPIES = 5  # each way


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

    runner.run(Plan(0, _everybody(shape), ()))
    taken: list[tuple[Plan, list[float]]] = [(plan, []) for plan in _steps(shape)]
    met: set[tuple[str, int]] = set()
    for count, (plan, times) in enumerate(taken * _ROUNDS):
        if count >= _FEWEST and clock() >= until:
            break
        if not met.issuperset(programs := _programs(shape, plan)):
            met |= programs
            runner.run(plan)  # a program's first run is slow, and slower than any user's will be
        times.append(seconds(plan))
    known = [(plan.load, median(times)) for plan, times in taken if times]
    overlaps = runner.platform != "cpu"
    model = fit(known, shape.token_buckets, overlaps=overlaps, page_bytes=runner.page_bytes)
    pages = min(3 * SIZES[-1], shape.host_pages, shape.num_pages)
    if pages:
        copies = tuple((page, page) for page in range(pages))
        ways = (Plan(0, (), (), swap_out=copies), Plan(0, (), (), swap_in=copies))
        out_s, in_s = (median(seconds(way) for _ in range(_COPIES)) / pages for way in ways)
        model = replace(model, page_out_s=out_s, page_in_s=in_s)
    return model


def first_steps(runner: Runner, count: int = 2) -> Iterator[Plan]:
    """Those that tell most, to be run as they come: slots are taken for them."""
    runner.run(Plan(0, _everybody(runner.shape), ()))
    yield from islice(_steps(runner.shape), count)


def _everybody(shape: StepShape) -> tuple[Admission, ...]:
    rules = Sampling(max_tokens=1)
    return tuple(Admission(slot, slot, (0,), 1, rules) for slot in range(shape.max_slots))


def _programs(shape: StepShape, plan: Plan) -> set[tuple[str, int]]:
    tokens = next(size for size in shape.token_buckets if size >= plan.load.tokens)
    rows = next(size for size in shape.row_buckets if size >= len(plan.work))
    return {("forward", tokens), ("sample", rows)}


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
    longest = min(shape.max_context, max(own, 1) * shape.page_size)
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
