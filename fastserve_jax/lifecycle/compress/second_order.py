"""A matrix changed column by column, where those still to come make up for what each one lost.

What a change E of a matrix costs is tr(E G E^T) with the gram G of its inputs: the squared error of
its outputs on the text that was seen. When an input's column is settled, the best change of the
others follows from the inverse of G (Frantar et al., "GPTQ", 2022, section 3; with columns that
become zero it is Frantar & Alistarh, "SparseGPT", 2023, section 3). Numpy; knows no names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.models.precision import W8A8, Stored
from fastserve_jax.weights.grids import coded, nearest, scales_of, spread

type Floats = NDArray[np.floating[Any]]
# Of the columns as they stand now, [in, out], and the number of one of them: what it becomes.
type Settle = Callable[[Floats, int], Floats]

_DAMPING = 0.01  # of the mean of G's diagonal, so that it has an inverse
_BLOCK = 128  # columns whose changes are added to the rest at once
_STRIP = 128  # columns of which some become zero, where no pattern says which


def _damped(gram: Floats) -> Floats:
    made = gram.astype(np.float64)
    made[np.diag_indices_from(made)] += max(_DAMPING * np.mean(np.diag(gram)), 1e-12)
    return made


def inverse_root(gram: Floats) -> Floats:
    """U, upper triangular, of U^T U = (G + damping)^-1: float64 [in, in]."""
    root: Floats = np.linalg.cholesky(np.linalg.inv(_damped(gram))).T
    return root


def settled(matrix: Floats, root: Floats, settle: Settle) -> Floats:
    """[out, in] of columns that `settle` made, one after the other."""
    left: Floats = np.ascontiguousarray(matrix.T, np.float32)
    made = np.empty_like(left)
    root = root.astype(np.float32)
    for first in range(0, len(left), _BLOCK):
        last = min(first + _BLOCK, len(left))
        errors: Floats = np.empty_like(left[first:last])
        for at in range(first, last):
            made[at] = settle(left, at)
            error = (left[at] - made[at]) / root[at, at]
            errors[at - first] = error
            left[at:last] -= root[at, at:last, None] * error
        left[last:] -= root[first:last, last:].T @ errors
    return made.T


def gptq(matrix: Floats, gram: Floats, stored: Stored) -> tuple[NDArray[Any], Floats]:
    """Weight and scale as grids.rounded gives them. Scales are chosen first, then columns settle in
    the order of how much goes in: the first ones have most others to make up for them."""
    if stored.kind == W8A8:
        matrix, gram = spread(matrix), spread(spread(gram).T)
    scales = scales_of(matrix, stored, np.diag(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    each = matrix.shape[1] // len(scales)  # columns of a scale

    def settle(left: Floats, at: int) -> Floats:
        return nearest(left[at], scales[order[at] // each], stored)

    made = np.empty_like(matrix)
    made[:, order] = settled(matrix[:, order], inverse_root(gram[order][:, order]), settle)
    return coded(made, scales, stored), scales[0] if stored.kind == W8A8 else scales


def sparse(matrix: Floats, gram: Floats, share: float, pattern: tuple[int, int] | None) -> Floats:
    """Of each output `share` become zero, in each stretch of so many columns; with a pattern (2, 4)
    so many of each so many. What goes is what costs least by the inverse of G."""
    root = inverse_root(gram)
    worth = np.diag(root)[:, None] ** -2
    width = pattern[1] if pattern else _STRIP
    gone = np.zeros((width, len(matrix)), bool)

    def settle(left: Floats, at: int) -> Floats:
        if at % width == 0:
            stretch = left[at : at + width]
            count = pattern[0] if pattern else round(share * len(stretch))
            cost = stretch**2 * worth[at : at + width]
            gone[: len(stretch)] = smallest(cost.T, count).T
        return np.where(gone[at % width], 0, left[at])

    return settled(matrix, root, settle)


def smallest(numbers: Floats, count: int) -> NDArray[np.bool_]:
    """The `count` smallest along the last axis, as a mask."""
    mask = np.zeros(numbers.shape, bool)
    chosen = np.argsort(numbers, axis=-1, kind="stable")[..., :count]
    np.put_along_axis(mask, chosen, True, axis=-1)
    return mask


def without(matrix: Floats, gram: Floats, kept: NDArray[np.int64]) -> Floats:
    """[out, kept]: the matrix of some of its inputs that comes nearest to what all of them made,
    by least squares: W G[:, kept] G[kept, kept]^-1."""
    damped = _damped(gram)
    right = damped[kept] @ matrix.T.astype(np.float64)
    made: Floats = np.linalg.solve(damped[np.ix_(kept, kept)], right).T.astype(np.float32)
    return made
