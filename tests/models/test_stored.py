"""Matrices as they are stored: the product is that of the matrix they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.models.layers import Embedding, Linear, Matrix, best_output, project
from fastserve_jax.models.precision import FP8, INT4, INT8, W8A8, Precision, Stored
from fastserve_jax.weights import grids

KINDS = [Stored(INT8), Stored(W8A8), Stored(INT4, 16), Stored(FP8)]


def made(stored, out=40, size=64):
    matrix = np.random.default_rng(0).standard_normal((out, size)).astype(np.float32)
    weight, scale = grids.rounded(matrix, stored)
    return weight, scale, grids.widened(weight, scale, stored).astype(np.float64)


@pytest.mark.parametrize("rows", [3, 64])  # few, and so many that weights are widened once
@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_a_product(stored, rows):
    weight, scale, matrix = made(stored)
    x = np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)
    kept = Matrix(jnp.asarray(weight), jnp.asarray(scale))
    exact = x @ matrix.T
    error = np.asarray(project(jnp.asarray(x), kept, rows)) - exact
    assert np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.012
    if stored.kind != W8A8:
        assert best_output(jnp.asarray(x), kept, jnp.int32(rows)) is None


@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_rows_by_their_index(stored):
    weight, scale, matrix = made(stored)
    embed = Embedding(40, 64, jnp.int8 if stored.kind == W8A8 else stored)
    assert embed.weight.shape == weight.shape
    assert embed.scale.shape == scale.shape
    embed.weight[...], embed.scale[...] = jnp.asarray(weight), jnp.asarray(scale)
    assert np.allclose(embed(jnp.asarray([7, 0, 39])), matrix[[7, 0, 39]], atol=1e-5)


def test_a_map_with_what_is_around_it():
    weight, scale, matrix = made(Stored(INT4, 16), 40, 64)
    linear = Linear(40, 64, Stored(INT4, 16), jnp.float32)
    linear.weight[...], linear.scale[...] = jnp.asarray(weight), jnp.asarray(scale)
    linear.bias[...] = jnp.arange(40.0)
    x = np.random.default_rng(2).standard_normal((2, 128)).astype(np.float32)
    gated = x[:, :64] / (1 + np.exp(-x[:, :64])) * x[:, 64:]
    got = linear(jnp.asarray(x), jnp.int32(2), gate="silu", add=jnp.ones((2, 40)))
    assert np.allclose(got, gated @ matrix.T + np.arange(40) + 1, atol=0.2)


def test_each_matrix_by_its_name():
    precision = Precision(
        jnp.bfloat16, stored=(("embed", Stored(W8A8)), ("layers.0.attn.qkv", Stored(INT4, 32)))
    )
    assert precision.of("embed") == jnp.int8
    assert precision.of("layers.0.attn.qkv") == Stored(INT4, 32)
    assert precision.of("layers.1.attn.qkv") == jnp.bfloat16
