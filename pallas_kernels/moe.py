"""Rows through the matrices of their experts (Gale et al., "MegaBlocks", 2022): no row is padded to
another expert's count, and none is dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .target import target

_TILE = 128


def moe_grouped_matmul(
    x: jax.Array, weight: jax.Array, group_sizes: jax.Array, by: str | None = None
) -> jax.Array:
    """x [rows, in], those of the first expert first, times weight [experts, in, out] -> [rows, out]
    float32. group_sizes [experts] int32: rows of each; rows behind the last of them mean nothing.

    On a TPU jax's own kernel of blocks, elsewhere XLA's ragged product, which on a GPU multiplies
    all rows with all experts and masks the rest; of weights [experts, out, in] it would make a
    transposed copy there.
    """
    if (by or _implementation(x, weight)) == "tpu":
        return _by_blocks(x, weight, group_sizes)
    made: jax.Array = lax.ragged_dot(x, weight, group_sizes, preferred_element_type=jnp.float32)
    return made


def _implementation(x: jax.Array, weight: jax.Array) -> str:
    fits = weight.shape[1] % _TILE == 0 and weight.shape[2] % _TILE == 0
    return "tpu" if target().platform == "tpu" and fits else "xla"


def _by_blocks(
    x: jax.Array, weight: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows = len(x)
    x = jnp.pad(x, ((0, -rows % _TILE), (0, 0)))
    spare = len(x) - jnp.sum(group_sizes)  # its rows must all be somebody's
    sizes = group_sizes.at[-1].add(spare)
    made: jax.Array = gmm(
        x,
        weight,
        sizes,
        preferred_element_type=jnp.float32,
        tiling=(_TILE, *(_block(size) for size in weight.shape[1:])),
        interpret=interpret,
    )
    return made[:rows]


def _block(size: int) -> int:
    """Of inputs or outputs: the largest that divides them, up to 1024."""
    return next(block for block in range(1024, 0, -_TILE) if size % block == 0)
