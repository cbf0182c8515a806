"""What is beside a matrix: rows of any set in one product, whatever the matrix is made of."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastserve_jax.models.adapters import AdapterRoom, Added, Pair, own_columns
from fastserve_jax.models.layers import Linear, RMSNorm, activate, quantise

ROOM, ROWS, SIZE, OUTS = AdapterRoom(3, 2), 4, 64, (32, 16, 16)


def test_each_row_has_its_own_columns():
    own = np.asarray(own_columns(jnp.array([0, 3, 1, 3]), ROOM))
    assert own.tolist() == [
        [False] * 6,
        [False] * 4 + [True] * 2,
        [True] * 2 + [False] * 4,
        [False] * 4 + [True] * 2,
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_beside_a_matrix_with_all_that_stands_around_it(dtype, gate):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    linear, norm = Linear(64, SIZE, dtype), RMSNorm(SIZE, 1e-6, jnp.float32)
    weight, scale = drawn(64, SIZE), None
    if dtype == jnp.int8:
        weight, scale = quantise(jnp.asarray(weight))
        linear.scale = nnx.Param(scale[:, 0])
    linear.weight = nnx.Param(jnp.asarray(weight))
    norm, after = (None if gate else norm), RMSNorm(64, 1e-6, jnp.float32)
    pair = Pair(jnp.asarray(drawn(3, 6, SIZE)), tuple(jnp.asarray(drawn(n, 6)) for n in OUTS))
    index = np.array([0, 2, 3, 2])
    x, add = drawn(ROWS, SIZE * (2 if gate else 1)), drawn(ROWS, 64)
    around = {"norm": norm, "gate": gate, "add": jnp.asarray(add), "add_norm": after}
    beside = Added(pair, own_columns(jnp.asarray(index), ROOM))
    got = linear(jnp.asarray(x), jnp.int32(ROWS), **around, beside=beside)
    bare = np.asarray(linear(jnp.asarray(x), jnp.int32(ROWS), norm=norm, gate=gate))
    inner = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    if gate:
        inner = np.asarray(activate(gate, x[:, :SIZE])) * x[:, SIZE:]
    for row, of in enumerate(index):
        columns = slice(2 * of - 2, 2 * of)
        change = [b[:, columns] @ (a[columns] @ inner[row]) for a, b in zip(*pair, strict=True)]
        y = bare[row] + (np.concatenate(change) if of else 0)
        want = add[row] + y / np.sqrt((y * y).mean() + 1e-6)
        np.testing.assert_allclose(got[row], want, atol=1e-4)
