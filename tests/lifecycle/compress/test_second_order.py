"""What is left makes up for what is lost, and by how much it could at the best."""

import numpy as np
import pytest

from fastserve_jax.lifecycle.compress.second_order import gptq, settled, sparse, without
from fastserve_jax.lifecycle.compress.second_order import inverse_root as root_of
from fastserve_jax.models.precision import INT4, INT8, W8A8, Stored
from fastserve_jax.weights import grids


def given(out=24, size=160, tokens=400):
    """A matrix, and inputs that say much of each other, some of them large."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, size // 4)) @ rng.standard_normal((size // 4, size))
    x += 0.3 * rng.standard_normal((tokens, size))
    x[:, 7] *= 10
    x = x.astype(np.float32)
    return rng.standard_normal((out, size)).astype(np.float32), x, x.T @ x


def lost(matrix, other, x):
    exact = x.astype(np.float64) @ matrix.T
    return np.sum((x @ other.T - exact) ** 2) / np.sum(exact**2)


@pytest.mark.parametrize("stored", [Stored(INT4, 32), Stored(INT8), Stored(W8A8)], ids=str)
def test_outputs_lose_less_than_by_rounding(stored):
    matrix, x, gram = given()
    found = gptq(matrix, gram, stored)
    nearest = grids.rounded(matrix, stored, np.diag(gram))
    assert found[0].dtype == nearest[0].dtype
    assert [a.shape for a in found] == [a.shape for a in nearest]
    losses = [lost(matrix, grids.widened(*each, stored), x) for each in (found, nearest)]
    assert losses[0] < 0.5 * losses[1]


def test_inputs_that_say_nothing_of_each_other_are_rounded():
    matrix, _, _ = given()
    stored = Stored(INT4, 32)
    found = gptq(matrix, np.diag(np.linspace(1, 2, 160)).astype(np.float32), stored)
    matters = np.linspace(1, 2, 160).astype(np.float32)
    for one, other in zip(found, grids.rounded(matrix, stored, matters), strict=True):
        assert np.array_equal(one.astype(np.float32), other.astype(np.float32))


def test_one_settled_column_moves_the_others_to_the_optimum():
    matrix, _, gram = given(6, 12, 100)
    found = settled(matrix, root_of(gram), lambda left, at: left[at] * (at > 0))
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(12)
    change = np.outer(matrix[:, 0], np.linalg.solve(damped[1:, 1:], damped[1:, 0]))
    assert np.allclose(found[:, 1:], matrix[:, 1:] + change, atol=1e-4)
    assert not found[:, 0].any()


@pytest.mark.parametrize(("share", "pattern"), [(0.5, (2, 4)), (0.5, None), (0.25, None)])
def test_so_many_are_zero(share, pattern):
    matrix, x, gram = given()
    found = sparse(matrix, gram, share, pattern)
    assert (found == 0).mean() == share
    if pattern:
        assert ((found.reshape(24, -1, 4) == 0).sum(-1) == 2).all()
    cut = np.sort(np.abs(matrix).reshape(-1))[int(share * matrix.size)]
    assert lost(matrix, found, x) < 0.5 * lost(matrix, np.where(np.abs(matrix) < cut, 0, matrix), x)


def test_without_some_inputs_it_is_the_least_squares():
    matrix, x, gram = given(6, 40, 300)
    kept = np.arange(0, 40, 2)
    best = np.linalg.lstsq(x[:, kept], x @ matrix.T, rcond=None)[0].T
    found = without(matrix, gram, kept)
    ours, least, cut = (
        lost(matrix[:, :], _back(m, kept), x) for m in (found, best, matrix[:, kept])
    )
    assert least <= ours < 1.05 * least
    assert ours < 0.7 * cut


def _back(matrix, kept):
    whole = np.zeros((len(matrix), 40))
    whole[:, kept] = matrix
    return whole
