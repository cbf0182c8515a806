"""Matrices to int8, a scale for each output. Numpy in, numpy out; knows no names.

Turned along their input first, as activations will be: see models/spread.py.

Symmetric and per row of [out, in]: the scale can be taken out of the sum over `in`, so a product
of int8 matrices is exact in int32 and scaled once at its end (Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.models.spread import spreading

_MOST = 127  # not -128: a product of two of those is the one that overflows pairwise sums
_ROWS = 16384  # at a time: float32 copies of a whole vocabulary are large


def to_int8(matrix: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[out, in] of any float -> int8 [out, in] and scale [out] float32; their product is about
    the matrix with its input spread."""
    turn = spreading(matrix.shape[1])
    quantised = np.empty(matrix.shape, np.int8)
    scales = np.empty(matrix.shape[0], np.float32)
    for first in range(0, matrix.shape[0], _ROWS):
        rows = matrix[first : first + _ROWS].astype(np.float32)
        rows = (rows.reshape(-1, len(turn)) @ turn).reshape(rows.shape)
        scale = np.abs(rows).max(axis=1) / _MOST
        scale[scale == 0] = 1.0  # a row of zeros
        scales[first : first + _ROWS] = scale
        quantised[first : first + _ROWS] = np.rint(rows / scale[:, None])
    return quantised, scales
