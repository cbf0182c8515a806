"""Matrices [out, in] in few bits: scales, rounding, and back to floats. Numpy; knows no names.

Symmetric: a number is its code times a scale, which is of one output and one stretch of the input.
A scale of a stretch is a bfloat16, so that four bits stay little more than four; its sign is free,
which gives the one code that has no opposite (-8) to the number that needs it most.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.models.precision import FP8, INT4, INT8, W8A8, Stored
from fastserve_jax.models.spread import spreading

from .quantise import to_int8

type Floats = NDArray[np.floating[Any]]

_LEAST = {INT8: -127, W8A8: -127, INT4: -8}
_MOST = {INT8: 127, W8A8: 127, INT4: 7}
_LARGEST_FP8 = 448.0  # of e4m3fn
_SHRINK = np.linspace(1.0, 0.6, 9)  # of the largest number: what a stretch may lose at its ends


def spread(matrix: NDArray[Any]) -> Floats:
    """Along the last axis; see models/spread.py. Its own inverse."""
    turn = spreading(matrix.shape[-1])
    turned: Floats = (matrix.astype(np.float32).reshape(-1, len(turn)) @ turn).reshape(matrix.shape)
    return turned


def scales_of(matrix: Floats, stored: Stored, matters: Floats | None = None) -> Floats:
    """[groups, out], of w8a8 [1, out]. In four bits each scale is the one of several with which a
    stretch loses least, squared and by what each input `matters` [in]."""
    out, size = matrix.shape
    by_group = matrix.reshape(out, stored.groups(size), -1)
    largest = np.abs(by_group).max(-1)
    if stored.kind != INT4:
        top = _LARGEST_FP8 if stored.kind == FP8 else _MOST[stored.kind]
        return _rounded(largest / top, stored).T
    at = np.abs(by_group).argmax(-1)[..., None]
    full = -np.take_along_axis(by_group, at, -1)[..., 0] / -_LEAST[INT4]
    weight = np.ones(size, np.float32) if matters is None else matters
    weight = weight.reshape(1, by_group.shape[1], -1)
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for shrink in _SHRINK:
        scale = _rounded(full * shrink, stored)
        kept = _codes(by_group, scale[..., None], stored) * scale[..., None]
        lost = (weight * (by_group - kept) ** 2).sum(-1)
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return _rounded(best, stored).T


def _rounded(scale: Floats, stored: Stored) -> Floats:
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)  # nothing but zeros
    return scale if stored.kind == W8A8 else scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def _codes(numbers: Floats, scale: Floats, stored: Stored) -> Floats:
    """As floats."""
    if stored.kind == FP8:
        large = np.clip(numbers / scale, -_LARGEST_FP8, _LARGEST_FP8)
        return large.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes: Floats = np.clip(np.rint(numbers / scale), _LEAST[stored.kind], _MOST[stored.kind])
    return codes


def nearest(numbers: Floats, scale: Floats, stored: Stored) -> Floats:
    """The numbers that there are codes for, of that scale."""
    return _codes(numbers, scale, stored) * scale


def coded(matrix: Floats, scales: Floats, stored: Stored) -> NDArray[Any]:
    """[out, in] of the stored dtype; of w8a8 `matrix` is spread already."""
    out, size = matrix.shape
    by_group = matrix.reshape(out, len(scales), -1)
    codes = _codes(by_group, scales.T[..., None], stored).reshape(out, size)
    return codes.astype(np.dtype(stored.dtype))


def rounded(
    matrix: Floats, stored: Stored, matters: Floats | None = None
) -> tuple[NDArray[Any], Floats]:
    """Each number to the nearest there is: what `widened` takes."""
    if stored.kind == W8A8:
        return to_int8(matrix)
    scales = scales_of(matrix, stored, matters)
    return coded(matrix, scales, stored), scales


def widened(weight: NDArray[Any], scale: Floats, stored: Stored) -> Floats:
    """The matrix that is multiplied with: weight [out, in], scale [groups, out], or [out] of w8a8;
    some of the rows, if both have those."""
    numbers = weight.astype(np.float32)
    if stored.kind == W8A8:
        return spread(numbers * scale[:, None])
    by_group = numbers.reshape(len(weight), len(scale), -1) * scale.T[..., None]
    return by_group.reshape(numbers.shape)


def packed(weight: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """As it is kept in a file: bytes, of int4 two in each, the first one low."""
    if stored.kind != INT4:
        return weight.view(np.int8)
    codes = weight.astype(np.int8).view(np.uint8) & 15
    both: NDArray[np.int8] = (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8)
    return both


def unpacked(kept: NDArray[Any], stored: Stored) -> NDArray[Any]:
    if stored.kind != INT4:
        return kept.view(np.dtype(stored.dtype))
    codes = np.stack([kept << 4 >> 4, kept >> 4], -1).reshape(len(kept), -1)
    return codes.astype(ml_dtypes.int4)
