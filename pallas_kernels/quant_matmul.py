"""Products with weights of fewer bits: int8, int4 and fp8, with scales by output and by stretch.

Two kinds. With activations in int8, products and their sums are integers, which is exact and twice
bf16's rate where a chip has it. With activations in a float type the weights are widened on their
way to the product, which pays where reading them is what takes time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .target import target

_FEW = 8  # rows; of more a product pays


def quant_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    x_scale: jax.Array | None = None,
    by: str | None = None,
) -> jax.Array:
    """x [rows, in] times weight [out, in] -> [rows, out] float32.

    weight   int8, int4 or a float8; the last of Hopper and later: before, it is widened to a copy
    scales   [groups, out] float32: `in` is cut into so many stretches, each with its own scale
    x        float; or int8, and then x_scale [rows, 1] float32 is its own, and weight int8
    """
    assert (x.dtype == jnp.int8) == (x_scale is not None)
    if (by or implementation(x, weight, scales)) == "tpu":
        from . import tpu

        made: jax.Array = tpu.quant_matmul(x, weight, scales, x_scale)
        return made
    return _by_xla(x, weight, scales, x_scale)


def implementation(x: jax.Array, weight: jax.Array, scales: jax.Array) -> str:
    """ "tpu" where its kernel takes such arrays; "xla" everywhere else."""
    size = weight.shape[1]
    fits = size % scales.shape[0] == 0 and (size // scales.shape[0]) % 128 == 0
    fits &= x.dtype != jnp.int8 or target().has_int8
    return "tpu" if target().platform == "tpu" and fits else "xla"


def _by_xla(
    x: jax.Array, weight: jax.Array, scales: jax.Array, x_scale: jax.Array | None
) -> jax.Array:
    """On a GPU the product reads weights as they lie and widens them on its way, unless something
    else is done to them before: so scales come after it, stretch by stretch. Of many rows its sums
    by stretch would be larger than weights that are widened and scaled once."""
    groups = scales.shape[0]
    stretch = weight.shape[1] // groups
    sums = jnp.float32 if x_scale is None else jnp.int32
    after = 1 if x_scale is None else x_scale
    few = x_scale is None and len(x) <= _FEW and weight.dtype == jnp.int8
    if few and target().platform == "cpu":
        return _widened_on_the_way(x, weight, scales)
    if groups == 1:
        return _product(x, weight.astype(x.dtype), sums).astype(jnp.float32) * scales * after
    by_group = weight.reshape(-1, groups, stretch).astype(x.dtype)
    if x_scale is None and 2 * len(x) > stretch:
        scaled = (by_group * scales.T[:, :, None]).astype(x.dtype)
        return _product(x, scaled.reshape(weight.shape), sums)
    x = x.reshape(-1, groups, stretch)
    made = jnp.einsum("rgk,ogk->gro", x, by_group, preferred_element_type=sums)
    return jnp.sum(made * scales[:, None], axis=0) * after


def _widened_on_the_way(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """As one sum, which a CPU's loop takes weights into as they lie; before a product it would
    write them all down in float."""
    groups = scales.shape[0]
    x = x.astype(jnp.float32).reshape(len(x), 1, groups, -1)
    wide = weight.reshape(-1, *x.shape[2:]).astype(jnp.float32)
    return jnp.sum(jnp.sum(x * wide, -1) * scales.T, -1)


def _product(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, preferred_element_type=dtype)
