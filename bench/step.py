"""What a step takes on this machine, program by program, beside its floor.

    python bench/step.py [MODEL] [--rows 1,8,32] [--chunk 128] [--context 128] [--repeats 30]

Hand-written plans go through the programs that serve, each waited for by itself. The floor of a
program is the longer of two: the bytes of weights and pages that it must read over what all cores
were measured to read, and its multiplications over the best product measured here. Draws come with
the rules that follow: greedy, and what a model's makers often advise.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import run

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.cli import cache_folder
from fastserve_jax.config import load_settings
from fastserve_jax.core.types import Admission, Plan, Sampling, Work
from fastserve_jax.models.layers import Matrix, project

RULES = {
    "greedy": {"temperature": 0.0},
    "temperature 1, top_k 64, top_p 0.95": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
}


def measure(
    model: str = "gemma3-270m",
    *,
    rows: str = "1,8,32",
    chunk: int = 128,
    context: int = 128,
    repeats: int = 30,
) -> None:
    sets = [f"engine.step_tokens={max(chunk, 64)}", "engine.speculate=off"]
    loaded = load(model, load_settings(None, sets), cache_folder())
    rates = Rates(reading(), multiplying(loaded))
    print(f"{loaded.name}: {rates.bytes_per_s / 1e9:.0f} GB/s, {rates.macs_per_s / 1e9:.0f} GMAC/s")
    print(f"{'':24}program        ms  floor ms  reads MB   GMAC")
    with loaded.runner as runner:
        timed = Timed(runner)
        for name, rules in RULES.items():
            slots = range(loaded.limits.max_slots)
            given = [Admission(s, s, (0,), 1, Sampling(1, **rules)) for s in slots]
            runner.run(Plan(0, tuple(given), ()))
            print(name)
            for count in map(int, rows.split(",")):
                works = [work(loaded, slot, 1, context) for slot in range(count)]
                told = timed.medians(lambda works=works: runner.run(Plan(0, (), works)), repeats)
                report(f"{count} rows of {context}", told, floors(loaded, works), rates)
        works = [work(loaded, 0, chunk, chunk)]
        told = timed.medians(lambda: runner.run(Plan(0, (), works)), repeats)
        report(f"a prompt of {chunk}", told, floors(loaded, works), rates)


class Rates(NamedTuple):
    bytes_per_s: float
    macs_per_s: float


def work(loaded: Loaded, slot: int, count: int, length: int) -> Work:
    pages = loaded.limits.pages_for(length)
    return Work(
        slot, slot, length - count, count, 0, tuple(range(slot * pages, (slot + 1) * pages)), True
    )


class Timed:
    """Stands between a runner and its programs."""

    def __init__(self, runner: Any) -> None:
        self._spent_s: dict[str, list[float]] = defaultdict(list)
        runner._programs = {
            name: self._timed(name, program) for name, program in runner._programs.items()
        }

    def _timed(self, name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            made = jax.block_until_ready(program(*given))
            self._spent_s[name].append(time.perf_counter() - began)
            return made

        return call

    def medians(self, once: Callable[[], object], repeats: int) -> dict[str, float]:
        """Seconds by program, and of all that is not in one."""
        for _ in range(3):
            once()
        self._spent_s.clear()
        whole = []
        for _ in range(repeats):
            began = time.perf_counter()
            once()
            whole.append(time.perf_counter() - began)
        told = {name: median(spent) for name, spent in self._spent_s.items()}
        return told | {"around them": max(0.0, median(whole) - sum(told.values()))}


def floors(loaded: Loaded, works: list[Work]) -> dict[str, tuple[float, float]]:
    """Bytes read and multiplications, of forward and of sample."""
    config, runner = loaded.config, loaded.runner
    leaves = [leaf for leaf in runner._params if leaf.size > config.hidden_size * 64]
    head = loaded.runner._head.weight
    layers = [leaf for leaf in leaves if leaf.shape != head.shape]
    tokens, rows = sum(w.count for w in works), len(works)
    kv_bytes = sum(w.start + w.count for w in works) * runner.page_bytes // runner.shape.page_size
    seen = sum(w.count * (w.start + (w.count + 1) / 2) for w in works)
    attention = 2 * seen * config.num_heads * config.head_dim * config.num_layers
    return {
        "forward": (
            sum(leaf.nbytes for leaf in layers) + kv_bytes,
            tokens * sum(leaf.size for leaf in layers) + attention,
        ),
        "sample": (head.nbytes, rows * head.size),
    }


def report(
    title: str, told: dict[str, float], least: dict[str, tuple[float, float]], rates: Rates
) -> None:
    for name, spent_s in told.items():
        line = f"  {title:22}{name:13}{spent_s * 1e3:6.2f}"
        if found := least.get(name.partition("[")[0]):
            floor_s = max(found[0] / rates.bytes_per_s, found[1] / rates.macs_per_s)
            line += f"{floor_s * 1e3:10.2f}{found[0] / 1e6:10.0f}{found[1] / 1e9:7.1f}"
        print(line)
        title = ""


def reading(size: int = 1 << 28, rounds: int = 5) -> float:
    """Bytes a second, all cores together."""
    cores = os.cpu_count() or 1
    parts = [np.ones(size // 8 // cores) for _ in range(cores)]
    best_s = np.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best_s = min(best_s, time.perf_counter() - began)
    return size / best_s


def multiplying(loaded: Loaded, rounds: int = 8) -> float:
    """Multiplications a second of the best product here, in the type that the head has."""
    head = loaded.runner._head
    matrix = Matrix(head.weight[:4096], None if head.scale is None else head.scale[:4096])
    x = jnp.ones((512, head.weight.shape[1]), jnp.float32)
    product = jax.jit(lambda x, matrix: project(x, matrix, 512))
    best_s = np.inf
    for _ in range(rounds):
        began = time.perf_counter()
        product(x, matrix).block_until_ready()
        best_s = min(best_s, time.perf_counter() - began)
    return x.size * matrix.weight.shape[0] / best_s


if __name__ == "__main__":
    run(measure)
