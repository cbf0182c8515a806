"""Products with weights of fewer bits, and those of experts: XLA's and the TPU kernels against
float64; pages copied whole, without races."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    cases,
    gather_pages,
    moe_grouped_matmul,
    quant_matmul,
    reference,
    scatter_pages,
    tpu,
)
from pallas_kernels.moe import _by_blocks
from pallas_kernels.tpu import matmul as tpu_matmul

INTERPRET = pltpu.InterpretParams(detect_races=True)


def named(listed):
    return pytest.mark.parametrize("case", listed, ids=lambda case: case.name)


def operands(case):
    random = np.random.default_rng(0)
    shape = (case.outputs, case.inputs)
    if case.dtype.startswith("float8"):
        weight = jnp.asarray(random.normal(size=shape), case.dtype)
    else:
        most = 7 if case.dtype == "int4" else 127
        weight = jnp.asarray(random.integers(-most, most + 1, shape), case.dtype)
    scales = jnp.asarray(random.uniform(0.5, 2, (case.groups, case.outputs)) / 100, jnp.float32)
    if not case.is_integer:
        x = jnp.asarray(random.normal(size=(case.rows, case.inputs)), jnp.bfloat16)
        return x, weight, scales, None
    x = jnp.asarray(random.integers(-127, 128, (case.rows, case.inputs)), jnp.int8)
    return x, weight, scales, jnp.asarray(random.uniform(0.5, 2, (case.rows, 1)), jnp.float32)


def in_float64(x, weight, scales, x_scale):
    x, weight, scales = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, weight, scales))
    weight = weight * np.repeat(scales, weight.shape[1] // len(scales), axis=0).T
    return (x if x_scale is None else x * np.asarray(x_scale, np.float64)) @ weight.T


@named(cases.MATMUL)
@pytest.mark.parametrize("by", ["reference", "xla", "tpu"])
def test_quantised_product(case, by):
    given = operands(case)
    run = {
        "reference": reference.quant_matmul,
        "xla": partial(quant_matmul, by="xla"),
        "tpu": partial(tpu.quant_matmul, interpret=INTERPRET),
    }[by]
    got, want = np.asarray(run(*given)), in_float64(*given)
    # Widened by stretches and rounded again, XLA's weights are bf16's.
    rough = by == "xla" and case.groups > 1 and not case.is_integer
    assert np.abs(got - want).max() < (4e-3 if rough else 2e-5) * np.abs(want).max()


@named(cases.MOE)
@pytest.mark.parametrize("by", ["reference", "xla", "tpu"])
def test_product_of_experts(case, by):
    random = np.random.default_rng(0)
    rows = sum(case.group_sizes) + case.spare
    x = jnp.asarray(random.normal(size=(rows, case.inputs)), jnp.bfloat16)
    shape = (case.experts, case.outputs, case.inputs)
    weight = jnp.asarray(random.normal(size=shape), jnp.bfloat16)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    run = {
        "reference": reference.moe_grouped_matmul,
        "xla": partial(moe_grouped_matmul, by="xla"),
        "tpu": partial(_by_blocks, interpret=True),
    }[by]
    got, first = np.asarray(run(x, weight, sizes)), 0
    for expert, size in enumerate(case.group_sizes):
        own = np.asarray(x[first : first + size], np.float64)
        want = own @ np.asarray(weight[expert], np.float64).T
        np.testing.assert_allclose(got[first : first + size], want, atol=1e-3, rtol=1e-4)
        first += size


def pages(case, lanes=128):
    random = np.random.default_rng(0)
    shape = case.layout(lanes).shape
    layers = [
        jnp.asarray(random.integers(-99, 99, shape), case.dtype) for _ in range(case.num_layers)
    ]
    chosen = random.permutation(case.num_pages)[: case.size].astype(np.int32)
    chosen[-2:] = chosen[-3]  # filled up with the last
    return layers, jnp.asarray(chosen)


@named(cases.PAGES)
def test_pages_there_and_back(case):
    layers, sources = pages(case)
    want = np.asarray(reference.gather_pages(layers, sources))
    for got in (gather_pages(layers, sources), tpu.gather_pages(layers, sources, INTERPRET)):
        np.testing.assert_array_equal(np.asarray(got), want)
    real = case.size - 2
    targets = jnp.flip(jnp.arange(case.size) + 2).astype(jnp.int32)
    filled = targets.at[real:].set(targets[real - 1])
    staged = jnp.asarray(want).at[real:].set(want[real - 1])
    expected = reference.scatter_pages(layers, staged, filled, real)
    for got in (
        scatter_pages(layers, staged, filled, jnp.int32(real)),
        tpu.scatter_pages(layers, staged, filled, jnp.int32(real), INTERPRET),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# Wrong kernels, to see the checks fail


def test_a_sum_that_is_not_begun_anew_is_seen(monkeypatch):
    case = cases.MATMUL[0]
    given = operands(case)
    monkeypatch.setattr(tpu_matmul.jnp, "zeros_like", lambda like: like[...])
    got = np.asarray(tpu.quant_matmul(*given, interpret=INTERPRET))
    assert not np.allclose(got, in_float64(*given), rtol=1e-3)


def test_two_copies_to_one_page_are_a_race():
    case = cases.PAGES[0]
    layers, sources = pages(case)
    staged = reference.gather_pages(layers, sources)
    with pytest.raises(Exception, match="RACE"):
        jax.block_until_ready(
            tpu.scatter_pages(layers, staged, sources, jnp.int32(case.size), INTERPRET)
        )
    pltpu.reset_tpu_interpret_mode_state()
