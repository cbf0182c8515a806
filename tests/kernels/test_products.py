"""Products with weights of fewer bits, and those of experts: XLA's and the TPU kernels against
float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    Target,
    cases,
    compiling_for,
    moe_grouped_matmul,
    quant_matmul,
    reference,
    tpu,
)
from pallas_kernels.moe import _by_blocks
from pallas_kernels.quant_matmul import implementation
from pallas_kernels.tpu import matmul as tpu_matmul

INTERPRET = pltpu.InterpretParams(detect_races=True)


def named(listed):
    return pytest.mark.parametrize("case", listed, ids=lambda case: case.name)


@cache
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


@cache
def in_float64(case):
    x, weight, scales, x_scale = operands(case)
    x, weight, scales = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, weight, scales))
    weight = weight * np.repeat(scales, weight.shape[1] // len(scales), axis=0).T
    return (x if x_scale is None else x * np.asarray(x_scale, np.float64)) @ weight.T


def is_scaled_before(case):
    """Whether XLA's weights are scaled, and so rounded to bf16, before they are multiplied."""
    stretch = case.inputs // case.groups
    return case.groups > 1 and not case.is_integer and 2 * case.rows > stretch


@named(cases.MATMUL)
@pytest.mark.parametrize("by", ["reference", "xla", "tpu"])
def test_quantised_product(case, by):
    given = operands(case)
    run = {
        "reference": reference.quant_matmul,
        "xla": partial(quant_matmul, by="xla"),
        "tpu": partial(tpu.quant_matmul, interpret=INTERPRET),
    }[by]
    got, want = np.asarray(run(*given)), in_float64(case)
    rough = by == "xla" and is_scaled_before(case)
    assert np.abs(got - want).max() < (4e-3 if rough else 2e-5) * np.abs(want).max()


@cache
def of_experts(case):
    """Rows, weights, and their product in float64."""
    random = np.random.default_rng(0)
    rows = sum(case.group_sizes) + case.spare
    x = jnp.asarray(random.normal(size=(rows, case.inputs)), jnp.bfloat16)
    shape = (case.experts, case.inputs, case.outputs)
    weight = jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16)
    wide, want, first = np.asarray(x, np.float64), [], 0
    for expert, size in enumerate(case.group_sizes):
        want.append(wide[first : first + size] @ np.asarray(weight[expert], np.float64))
        first += size
    return x, weight, np.concatenate(want)


@named(cases.MOE)
@pytest.mark.parametrize("by", ["reference", "xla", "tpu"])
def test_product_of_experts(case, by):
    x, weight, want = of_experts(case)
    run = {
        "reference": reference.moe_grouped_matmul,
        "xla": partial(moe_grouped_matmul, by="xla"),
        "tpu": partial(_by_blocks, interpret=True),
    }[by]
    got = np.asarray(run(x, weight, jnp.asarray(case.group_sizes, jnp.int32)))
    np.testing.assert_allclose(got[: len(want)], want, atol=1e-3, rtol=1e-4)


def test_each_chip_multiplies_by_what_it_has():
    x = jax.ShapeDtypeStruct((8, 1024), jnp.int8)
    weight, scales = (jax.ShapeDtypeStruct(*a) for a in (((256, 1024), jnp.int8), ((1, 256), "f4")))
    assert implementation(x, weight, scales) == "xla"
    for chip, want in (
        (Target("tpu"), "tpu"),
        (Target("tpu", has_int8=False), "xla"),
        (Target("gpu"), "xla"),
    ):
        with compiling_for(chip):
            assert implementation(x, weight, scales) == want
    with compiling_for(Target("tpu")):
        narrow = jax.ShapeDtypeStruct((16, 256), jnp.float32)
        assert implementation(x, weight, narrow) == "xla", "stretches of 64 are no lanes"


# Wrong kernels, to see the checks fail


def test_a_sum_that_is_not_begun_anew_is_seen(monkeypatch):
    case = cases.MATMUL[0]
    given = operands(case)
    monkeypatch.setattr(tpu_matmul.jnp, "zeros_like", lambda like: like[...])
    got = np.asarray(tpu.quant_matmul(*given, interpret=INTERPRET))
    assert not np.allclose(got, in_float64(case), rtol=1e-3)
