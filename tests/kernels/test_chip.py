"""The kernels on the accelerator that is here: values of every case, by what the platform takes.

Nothing is interpreted, so this is where the interpreters' and the compilers' word is checked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import cases, dispatch, reference, target
from tests.kernels.rows import build, options
from tests.kernels.test_pages import pages, places
from tests.kernels.test_products import in_float64, is_scaled_before, named, of_experts, operands

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu", reason="no accelerator is here to run its kernels"
)


def distance(got, want):
    """Of what differs, over what it should be, both as lengths; nan where anything is."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("seed", [0, 1])
@named(cases.ATTENTION)
def test_attention(case, seed):
    arrays = build(case, jnp.bfloat16, seed, lanes=target().lanes)
    given = options(case, seed)
    used = int(arrays[4][-1])
    by = dispatch.implementation(*arrays[:2])
    assert by == ("xla" if case.page_size < 16 else target().platform)
    run = jax.jit(partial(pallas_kernels.ragged_paged_attention, **given, with_lse=True))
    out, lse = run(*arrays)
    exact = arrays[0].astype(jnp.float32), *arrays[1:]
    want, logs = reference.ragged_paged_attention(*exact, **given, with_lse=True)
    assert distance(out[:used], want[:used]) < 6e-3  # weights and what is mixed are bf16's
    assert distance(lse[:used], logs[:used]) < 1e-3


@named(cases.PAGES)
def test_pages_there_and_back(case):
    layers, sources = pages(case, target().lanes)
    want = reference.gather_pages(layers, sources)
    got = jax.jit(pallas_kernels.gather_pages)(layers, sources)
    np.testing.assert_array_equal(np.asarray(got), want)
    real = case.size - 2
    targets = jnp.flip(jnp.arange(case.size) + 2).astype(jnp.int32)
    filled = targets.at[real:].set(targets[real - 1])
    staged = jnp.asarray(want).at[real:].set(want[real - 1])
    expected = reference.scatter_pages(layers, staged, filled, real)
    written = jax.jit(pallas_kernels.scatter_pages)(layers, staged, filled, jnp.int32(real))
    for ours, theirs in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_rows_go_to_their_places(dtype):
    random = np.random.default_rng(1)
    stored = jnp.asarray(random.integers(-99, 99, (24, 3, 32, 128)), dtype)
    at, offsets = places(24, 32)
    rows = jnp.asarray(random.integers(-99, 99, (len(at), 3, 128)), dtype)
    want = np.asarray(stored.at[at, :, offsets].set(rows, mode="drop"))
    write = jax.jit(pallas_kernels.write_kv, donate_argnums=0)
    got = write(stored, rows[..., :64], rows[..., 64:], at, offsets)
    np.testing.assert_array_equal(np.asarray(got), want)


@named(cases.MATMUL)
def test_quantised_product(case):
    got = jax.jit(pallas_kernels.quant_matmul)(*operands(case))
    rough = target().platform != "tpu" and is_scaled_before(case)
    assert distance(got, in_float64(case)) < (4e-3 if rough else 2e-5)


@named(cases.MOE)
def test_product_of_experts(case):
    x, weight, want = of_experts(case)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    got = jax.jit(pallas_kernels.moe_grouped_matmul)(x, weight, sizes)
    assert distance(got[: len(want)], want) < 1e-4
