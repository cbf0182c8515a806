"""What each kernel takes on the device that is here, beside its floor and beside XLA's own way.

    python bench/kernels.py [--only NAME] [--repeats 20]

The floor is the longer of two: the bytes that must be read and written over what a copy was
measured to move, and the operations over the best product in bf16 measured here. A kernel is run
some times in one program, each time on what the last made of its input, and what is told is the
median of the differences between many times and few, so that neither dispatch nor the clock counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import run
from jax import lax

from pallas_kernels import (
    KVLayout,
    cases,
    dispatch,
    gather_pages,
    moe_grouped_matmul,
    quant_matmul,
    ragged_paged_attention,
    target,
)

FEW = 4


class Timed(NamedTuple):
    name: str
    step: Callable[..., Any]  # of x and `given`: something of x's shape and type
    plain: Callable[..., Any] | None  # the same by XLA, where the kernel is another
    x: Any
    given: tuple[Any, ...]
    bytes: int  # that must be read and written
    operations: int


def measure(*, only: str = "", repeats: int = 20, rounds: int = 5) -> None:
    moved, done = copying(), multiplying()
    print(f"{jax.devices()[0].device_kind}: {moved / 1e9:.0f} GB/s, {done / 1e12:.0f} TFLOP/s")
    print(f"{'':34}ms  floor ms   of it    XLA ms     MB    GFLOP")
    for timed in every():
        if only not in timed.name:
            continue
        floor_s = max(timed.bytes / moved, timed.operations / done)
        try:
            spent_s = each_s(timed.step, timed.x, timed.given, repeats, rounds)
        except Exception as error:
            print(f"{timed.name:30} {type(error).__name__}: {error}"[:300], flush=True)
            continue
        line = f"{timed.name:30}{spent_s * 1e3:8.4f}{floor_s * 1e3:9.4f}{floor_s / spent_s:8.0%}"
        plain = "         -"
        if timed.plain is not None:
            plain = f"{each_s(timed.plain, timed.x, timed.given, repeats, rounds) * 1e3:10.4f}"
        print(f"{line}{plain}{timed.bytes / 1e6:8.1f}{timed.operations / 1e9:8.2f}", flush=True)


def each_s(
    step: Callable[..., Any], x: Any, given: tuple[Any, ...], repeats: int, rounds: int
) -> float:
    """Seconds of one of them."""

    def times(count: int) -> Callable[..., Any]:
        def many(x: Any, *given: Any) -> Any:
            return lax.fori_loop(0, count, lambda _, x: step(x, *given), x)

        return jax.jit(many).lower(x, *given).compile()

    few, many = times(FEW), times(FEW + repeats)
    for program in (few, many):
        jax.block_until_ready(program(x, *given))
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(few(x, *given))
        between = time.perf_counter()
        jax.block_until_ready(many(x, *given))
        spent.append(time.perf_counter() - between - (between - began))
    return median(spent) / repeats


def every() -> Iterator[Timed]:
    for case in cases.BUSY:
        yield attention(case)
    for case in cases.PAGES:
        yield pages(case)
    for case in cases.MATMUL:
        yield matmul(case)
    for case in cases.MOE:
        yield experts(case)


def attention(case: cases.AttentionCase) -> Timed:
    random = np.random.default_rng(0)
    layout = case.layout(target().lanes)
    rows = np.array(case.rows, np.int32)
    tokens = int(rows[:, 0].sum())
    counts = -(-rows[:, 1] // case.page_size)
    table, order = np.zeros((len(rows), counts.max()), np.int32), random.permutation(counts.sum())
    for row, end in enumerate(np.cumsum(counts)):
        table[row, : counts[row]] = order[end - counts[row] : end]
    key = jax.random.key(0)
    q = jax.random.normal(key, (tokens, case.num_heads, case.head_dim), jnp.bfloat16)
    kv = jax.random.normal(key, layout.shape, jnp.bfloat16)
    bounds = np.concatenate([[0], np.cumsum(rows[:, 0])]).astype(np.int32)
    distribution = np.array([(rows[:, 0] == 1).sum(), len(rows)], np.int32)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}
    given = kv, *map(jnp.asarray, (rows[:, 1], table, bounds, distribution))
    read = operations = 0
    for new, total in rows.tolist():
        window = case.window or total
        seen = [min(window, at + 1) for at in range(total - new, total)]
        read += min(total, window + new - 1)
        operations += 4 * case.num_heads * case.head_dim * sum(seen)
    token_bytes = layout.page_bytes(jnp.bfloat16) // case.page_size
    by = dispatch.implementation(q, kv)
    return Timed(
        f"attention {case.name}",
        partial(ragged_paged_attention, **options),
        None if by == "xla" else partial(ragged_paged_attention, **options, by="xla"),
        q,
        given,
        read * token_bytes + 2 * q.nbytes,
        operations,
    )


def pages(case: cases.PagesCase) -> Timed:
    layout = KVLayout(512, case.num_kv_heads, case.page_size, case.head_dim, target().lanes)
    size = 16
    layers = [jnp.ones(layout.shape, case.dtype) for _ in range(case.num_layers)]
    staged = gather_pages(layers, jnp.arange(size))
    sources = jnp.asarray(np.random.default_rng(0).permutation(512)[:size], jnp.int32)

    def step(staged: Any, sources: Any, *layers: Any) -> Any:
        moved = sources + staged.reshape(-1)[0].astype(jnp.int32) - 1  # another each time, it says
        return gather_pages([*layers], moved)

    return Timed(
        f"gather {case.name}", step, None, staged, (sources, *layers), 2 * staged.nbytes, 0
    )


def matmul(case: cases.MatmulCase) -> Timed:
    key, dtype = jax.random.key(0), jnp.int8 if case.is_integer else jnp.bfloat16
    x = jax.random.normal(key, (case.rows, case.inputs))
    x = (x * 40).astype(jnp.int8) if case.is_integer else x.astype(dtype)
    weight = jax.random.normal(key, (case.outputs, case.inputs)) * 3
    weight = weight.astype(case.dtype)
    given = weight, jnp.ones((case.groups, case.outputs)) / 100
    given += (jnp.ones((case.rows, 1)),) if case.is_integer else ()
    bits = 4 if case.dtype == "int4" else 8
    return Timed(
        f"matmul {case.name}",
        lambda x, *given: _after(x, quant_matmul(x, *given)),
        None,
        x,
        given,
        weight.size * bits // 8 + x.nbytes + case.rows * case.outputs * 4,
        2 * case.rows * weight.size,
    )


def experts(case: cases.MoeCase) -> Timed:
    key = jax.random.key(0)
    rows = sum(case.group_sizes) + case.spare
    x = jax.random.normal(key, (rows, case.inputs), jnp.bfloat16)
    shape = (case.experts, case.inputs, case.outputs)
    weight = jax.random.normal(key, shape, jnp.bfloat16)
    used = sum(size > 0 for size in case.group_sizes)
    return Timed(
        f"moe {case.name}",
        lambda x, *given: _after(x, moe_grouped_matmul(x, *given)),
        None,
        x,
        (weight, jnp.asarray(case.group_sizes, jnp.int32)),
        used * case.inputs * case.outputs * 2 + x.nbytes,
        2 * sum(case.group_sizes) * case.inputs * case.outputs,
    )


def _after(x: Any, made: Any) -> Any:
    """x again, once all of `made` is there."""
    x, made = lax.optimization_barrier((x, made))
    return x + (made[0, 0] * 0).astype(x.dtype)


def copying() -> float:
    """Bytes read and written a second, by a copy of more than any cache holds."""
    size = 1 << (24 if jax.default_backend() == "cpu" else 29)
    x = jnp.ones(size, jnp.float32)
    return 2 * x.nbytes / each_s(lambda x: -x, x, (), 8, 5)


def multiplying() -> float:
    """Operations a second of the best product in bf16."""
    size = 1 << (9 if jax.default_backend() == "cpu" else 13)
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / each_s(lambda x, y: x @ y * 1e-2, x, (x,), 8, 5)


if __name__ == "__main__":
    run(measure)
