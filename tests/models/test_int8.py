"""Int8 matrices: the product is that of the float ones but for rounding, outliers or not."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.models.layers import Embedding, Matrix, project, quantise, spread
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.spread import spreading
from fastserve_jax.weights.quantise import to_int8


@pytest.mark.parametrize(
    ("size", "block"), [(1, 1), (97, 1), (48, 16), (576, 64), (640, 64), (2048, 64)]
)
def test_spreading_is_its_own_inverse(size, block):
    turn = spreading(size)
    assert turn.shape == (block, block)
    assert np.allclose(turn @ turn, np.eye(block), atol=1e-6)
    x = np.random.default_rng(0).standard_normal((3, size), np.float32)
    assert np.allclose(spread(spread(jnp.asarray(x))), x, atol=1e-5)


def test_rows_use_all_of_eight_bits_and_rows_of_zeros_stay():
    x = jnp.asarray([[1.0, -2.0, 0.25], [0.0, 0.0, 0.0], [1e-30, 0.0, -1e-30]])
    rows, scale = quantise(x)
    assert rows.dtype == jnp.int8
    assert rows.tolist() == [[64, -127, 16], [0, 0, 0], [127, 0, -127]]
    assert scale[:, 0].tolist() == pytest.approx([2 / 127, 0.0, 1e-30 / 127])


@pytest.mark.parametrize("outlier", [1.0, 200.0])
def test_a_product_is_close_though_one_channel_is_huge(outlier):
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((96, 576), np.float32)
    x = rng.standard_normal((5, 576), np.float32)
    x[:, 100] *= outlier
    exact = x.astype(np.float64) @ matrix.T.astype(np.float64)
    weight, scale = to_int8(matrix)
    made = project(jnp.asarray(x), Matrix(jnp.asarray(weight), jnp.asarray(scale)), 5)
    error = np.sqrt(np.mean((np.asarray(made) - exact) ** 2) / np.mean(exact**2))
    assert error < 0.015
    # Without spreading, the outlier alone would be left of a row.
    rows, row_scale = quantise(jnp.asarray(x))
    plain = (np.asarray(rows, np.float64) * np.asarray(row_scale)) @ matrix.T
    lost = np.sqrt(np.mean((plain - exact) ** 2) / np.mean(exact**2))
    assert (lost > 2 * error) == (outlier > 1)


def test_an_embedding_gives_rows_back():
    matrix = np.random.default_rng(2).standard_normal((50, 64), np.float32)
    weight, scale = to_int8(matrix)
    embed = Embedding(50, 64, jnp.int8)
    embed.weight[...], embed.scale[...] = jnp.asarray(weight), jnp.asarray(scale)
    rows = np.asarray(embed(jnp.asarray([7, 0, 49])))
    assert np.abs(rows - matrix[[7, 0, 49]]).max() < 0.05


def test_kept_matrices_keep_their_type():
    precision = Precision(jnp.bfloat16, int8=True, kept=("layers.*.mlp.down", "head"))
    assert precision.of("layers.3.mlp.down") == jnp.bfloat16
    assert precision.of("head") == jnp.bfloat16
    assert precision.of("layers.3.mlp.gate_up") == jnp.int8
    assert Precision(jnp.float32).of("embed") == jnp.float32
