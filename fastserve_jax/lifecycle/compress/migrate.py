"""Large inputs made small where a norm or a matrix before them can make them so, at no cost.

An input divided by s and its column multiplied by it give the same product, and the division is
part of the norm before, or of the rows that make it. Which s loses least is searched: powers of how
large an input is (Lin et al., "AWQ", 2023, section 3.2), where activations are of eight bits over
powers of how large its column is (Xiao et al., "SmoothQuant", 2022, section 4).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.precision import W8A8, Stored
from fastserve_jax.weights.grids import rounded, spread, widened

from .seen import Seen

type Floats = NDArray[np.floating[Any]]

_POWERS = np.linspace(0, 1, 9)[:-1]


def migrate(
    config: ModelConfig,
    layer: int,
    arrays: dict[str, Floats],
    seen: dict[str, Seen],
    kinds: dict[str, Stored],
) -> None:
    """Changes arrays of that layer and what was seen of its matrices, for those in `kinds`."""
    at = f"layers.{layer}"
    if config.gated_mlp and f"{at}.mlp.down" in kinds and not config.num_experts:
        down = f"{at}.mlp.down"
        s = _best(arrays[f"{down}.weight"], seen[down], kinds[down])
        up = arrays[f"{at}.mlp.gate_up.weight"].copy()
        up[config.intermediate_size :] /= s[:, None]
        arrays[f"{at}.mlp.gate_up.weight"] = up
        _apply(down, s, arrays, seen)
    inner = "gate_up" if config.gated_mlp else "up"
    for norm, matrix in (("attn_norm", f"{at}.attn.qkv"), ("mlp_norm", f"{at}.mlp.{inner}")):
        if matrix not in kinds:
            continue
        s = _best(arrays[f"{matrix}.weight"], seen[matrix], kinds[matrix])
        of = f"{at}.{norm}.weight"
        # What will be served is a bfloat16: the matrix is multiplied with what it divides by.
        before, after = arrays[of], (arrays[of] / s).astype(ml_dtypes.bfloat16).astype(np.float32)
        s = np.where(after == 0, 1, before / np.where(after == 0, 1, after))
        arrays[of] = np.where(after == 0, before, after)
        if f"{at}.{norm}.bias" in arrays:
            arrays[f"{at}.{norm}.bias"] = arrays[f"{at}.{norm}.bias"] / s
        _apply(matrix, s, arrays, seen)


def _apply(matrix: str, s: Floats, arrays: dict[str, Floats], seen: dict[str, Seen]) -> None:
    arrays[f"{matrix}.weight"] = arrays[f"{matrix}.weight"] * s
    seen[matrix] = _divided(seen[matrix], s)


def _divided(seen: Seen, s: Floats) -> Seen:
    by = s.astype(np.float32)
    size, largest = seen.size / by, seen.largest / by
    return Seen(seen.gram / np.outer(by, by), size, largest, seen.samples / by)


def _best(matrix: Floats, seen: Seen, stored: Stored) -> Floats:
    """s [in] of several; ones are among them."""
    best, least = np.ones(matrix.shape[1]), np.inf
    for power in _POWERS:
        if stored.kind == W8A8:
            s = _at_least(seen.largest) ** power / _at_least(np.abs(matrix).max(0)) ** (1 - power)
            s = s if power else np.ones_like(s)
        else:
            s = _at_least(seen.size) ** power
        s = s / np.sqrt(s.max() * s.min())
        if (cost := lost(matrix * s, _divided(seen, s), stored)) < least:
            best, least = s, cost
    return best


def _at_least(numbers: Floats) -> Floats:
    """Away from zero, which an input that never comes is."""
    floor = max(1e-4 * float(numbers.max()), 1e-8)
    return np.maximum(numbers, floor)


def lost(matrix: Floats, seen: Seen, stored: Stored) -> float:
    """Squared error of the outputs on what was seen."""
    error = widened(*rounded(matrix, stored, np.diag(seen.gram)), stored) - matrix
    if stored.kind != W8A8:
        return float(((error @ seen.gram) * error).sum())
    rows = spread(seen.samples)
    scale = np.maximum(np.abs(rows).max(1, keepdims=True) / 127, 1e-30)
    given = spread(np.rint(rows / scale) * scale)
    return float(((given @ (matrix + error).T - seen.samples @ matrix.T) ** 2).sum())
