"""Outliers spread over their neighbours, so that eight bits hold a row. Numpy, no parameters.

A few channels of a decoder's activations are a hundred times the others, and set the scale of the
whole row. Blocks of channels are turned by a Hadamard matrix, which is orthogonal: an outlier
becomes a part of each channel of its block. A matrix turned alike along its input gives the same
product (Ashkboos et al., "QuaRot", 2024, section 3). Needs no data, unlike scales learned from it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_LARGEST = 64  # channels of a block; more spread further, and cost as much more


@cache
def spreading(size: int) -> NDArray[np.float32]:
    """[block, block], its own inverse, for the largest block of a power of two that divides
    `size`: Sylvester's construction, normed."""
    made = np.ones((1, 1))
    while 2 * len(made) <= _LARGEST and size % (2 * len(made)) == 0:
        made = np.block([[made, made], [made, -made]])
    turn: NDArray[np.float32] = (made / np.sqrt(len(made))).astype(np.float32)
    return turn
