"""Numbers in few bits: as near as their grid allows, and the same when read from a file."""

import ml_dtypes
import numpy as np
import pytest

from fastserve_jax.models.precision import FP8, INT4, INT8, W8A8, Stored
from fastserve_jax.weights import grids

KINDS = [Stored(INT8), Stored(W8A8), Stored(INT4, 32), Stored(INT4, 16), Stored(FP8)]


def matrix(out=24, size=96):
    made = np.random.default_rng(0).standard_normal((out, size)).astype(np.float32)
    made[3], made[5, :32] = 0, 0
    return made


@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_it_is_as_near_as_the_grid(stored):
    given = matrix()
    weight, scale = grids.rounded(given, stored)
    back = grids.widened(weight, scale, stored)
    assert weight.dtype == np.dtype(stored.dtype)
    assert scale.shape == ((24,) if stored.kind == W8A8 else (stored.groups(96), 24))
    error = np.sqrt(np.mean((back - given) ** 2) / np.mean(given**2))
    assert error < {INT8: 0.01, W8A8: 0.01, INT4: 0.1, FP8: 0.04}[stored.kind]
    assert not back[3].any()
    if stored.kind != W8A8:  # what is on the grid stays there
        assert np.array_equal(grids.coded(back, scale, stored), weight)
        assert np.array_equal(scale, scale.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("stored", KINDS, ids=str)
def test_a_file_gives_it_back_whole_and_by_rows(stored):
    weight, scale = grids.rounded(matrix(), stored)
    kept = grids.packed(weight, stored)
    assert kept.dtype == np.int8
    assert kept.size == weight.size // (2 if stored.kind == INT4 else 1)
    back = grids.unpacked(kept, stored)
    assert back.dtype == weight.dtype
    assert np.array_equal(back.astype(np.float32), weight.astype(np.float32))
    some = grids.widened(back[4:9], scale[..., 4:9], stored)
    assert np.allclose(some, grids.widened(weight, scale, stored)[4:9], atol=1e-6)


def test_a_scale_serves_what_matters():
    given = np.random.default_rng(1).uniform(0.4, 0.6, (1, 32)).astype(np.float32)
    given[0, 0] = 1.5  # for which the others are rounded, unless it is worth nothing
    lost = []
    for matters in (np.ones(32, np.float32), np.array([1e-6, *[1] * 31], np.float32)):
        back = grids.widened(*grids.rounded(given, Stored(INT4, 32), matters), Stored(INT4, 32))
        lost.append(np.sum((back - given)[0, 1:] ** 2))
    assert lost[1] < 0.9 * lost[0]


def test_the_code_without_an_opposite_is_used():
    given = np.array([[1.0, *([0.01] * 31)]], np.float32)
    weight, scale = grids.rounded(given, Stored(INT4, 32))
    assert weight.astype(int).min() == -8
    assert scale[0, 0] == -0.125
