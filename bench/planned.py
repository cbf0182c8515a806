"""What whole steps take on the accelerator that is here, with weights drawn at random, beside the
floors that `fastserve plan` gives.

    python bench/planned.py MODEL [--config FILE] [--rows 4,32,128] [--context 1024] [--chunk 1024]

MODEL may be a folder or a config.json, as for `plan`. A step is the decoder, the head and a greedy
draw, by the programs that serve; so many are dispatched behind each other as the server does it,
and what is told is the median of the differences between many and few.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from cyclopts import run

from fastserve_jax.chips import GPU_FRACTION, Chips, rates_of

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))  # before jax starts

import jax
import jax.numpy as jnp

from fastserve_jax.cli import cache_folder
from fastserve_jax.config import load_settings
from fastserve_jax.core.types import Admission, Plan, Sampling, Work
from fastserve_jax.errors import OperatorError
from fastserve_jax.models.decoder import State, fill, parameters
from fastserve_jax.planning.site import Site, make_site
from fastserve_jax.runtime.compile import compile_all
from fastserve_jax.runtime.runner import DeviceRunner
from fastserve_jax.runtime.step import empty_pages
from fastserve_jax.weights.load import open_config

FEW, MANY = 2, 12  # steps


def measure(
    model: str,
    *,
    config: Path | None = None,
    rows: str = "4,32,128",
    context: int = 1024,
    chunk: int = 1024,
    rounds: int = 5,
) -> None:
    settings = load_settings(config, [f"engine.max_context={context}"])
    device = jax.devices()[0]
    here = Chips(device.device_kind, device.platform, [device], rates_of(device.device_kind))
    name, known = open_config(model, cache_folder())
    site = make_site(name, known, settings, device.device_kind, here)
    counts = [min(int(count), site.steps.shape.max_slots) for count in rows.split(",")]
    chunk = min(chunk, context, site.steps.shape.step_tokens)
    with runner_of(site, [*counts, chunk], counts) as runner:
        asked = Sampling(1, temperature=0.0)
        slots = range(site.steps.shape.max_slots)
        runner.run(Plan(0, tuple(Admission(s, s, (0,), 1, asked) for s in slots), ()))
        print(f"{name} on {device.device_kind}, bf16, random weights")
        print(f"{'':28}ms  floor ms   of it  tokens/s")
        for count in counts:
            works = [work(site, slot, 1, context) for slot in range(count)]
            report(site, f"{count} rows of {context}", runner, works, context, rounds)
        works = [work(site, 0, chunk, context)]
        report(site, f"a chunk of {chunk}", runner, works, context, rounds)


def runner_of(site: Site, tokens: list[int], rows: list[int]) -> DeviceRunner:
    """With those programs alone that so many tokens and rows need."""
    shape, config = site.steps.shape, site.steps.config
    wanted = {"admit", "sample[4]"}
    for counts, sizes, program in (
        (tokens, shape.token_buckets, "forward"),
        (rows, shape.row_buckets, "sample"),
    ):
        for count in counts:
            wanted.add(f"{program}[{next(size for size in sizes if size >= count)}]")
    jobs = [job for name, job in site.programs().items() if name in wanted]
    compiled = compile_all(jobs, lambda done: print(f"compiled {done.name}", flush=True))
    pages = empty_pages(config, shape, site.precision.dtype)
    return DeviceRunner(config, drawn(site.empty), pages, shape, compiled)


def drawn(empty: State) -> State:
    keys = iter(jax.random.split(jax.random.key(0), len(parameters(empty))))

    def one(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.random.normal(next(keys), leaf.shape, leaf.dtype) * 0.02

    return fill(empty, {name: one(leaf) for name, leaf in parameters(empty).items()})


def work(site: Site, slot: int, count: int, length: int) -> Work:
    """The pages of all slots together may be more than there are: they share them then."""
    shape = site.steps.shape
    each = -(-length // shape.page_size)
    first = slot * each % max(1, shape.num_pages - each + 1)
    return Work(slot, slot, length - count, count, 0, tuple(range(first, first + each)), True)


def report(
    site: Site, title: str, runner: DeviceRunner, works: Sequence[Work], context: int, rounds: int
) -> None:
    plan = Plan(0, (), tuple(works))

    def chain(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count - 1):
            runner._start(plan)
        runner.run(plan)
        return time.perf_counter() - began

    chain(FEW)
    spent_s = median((chain(MANY) - chain(FEW)) / (MANY - FEW) for _ in range(rounds))
    tokens = sum(each.count for each in works)
    floor_s = site.sizes.work(len(works), tokens, context).floor_s(site.chips.rates, False)
    print(
        f"{title:24}{spent_s * 1e3:8.2f}{floor_s * 1e3:9.2f}{floor_s / spent_s:8.0%}"
        f"{tokens / spent_s:10,.0f}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        run(measure)
    except OperatorError as error:
        sys.exit(str(error))
