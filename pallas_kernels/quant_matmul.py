"""Products with weights of fewer bits: int8, int4 and fp8, with scales by output and by stretch.

Two kinds. With activations in int8, products and their sums are integers, which is exact and twice
bf16's rate where a chip has it. With activations in a float type the weights are widened on their
way to the product, which pays where reading them is what takes time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .target import target


def quant_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    x_scale: jax.Array | None = None,
    by: str | None = None,
) -> jax.Array:
    """x [rows, in] times weight [out, in] -> [rows, out] float32.

    weight   int8, int4 or a float8
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
    """ "tpu" where its kernel takes such arrays; "xla" everywhere else. On a GPU XLA's own products
    widen the weights as they are read."""
    size = weight.shape[1]
    fits = size % scales.shape[0] == 0 and (size // scales.shape[0]) % 128 == 0
    fits &= x.dtype != jnp.int8 or target().has_int8
    return "tpu" if target().platform == "tpu" and fits else "xla"


def _by_xla(
    x: jax.Array, weight: jax.Array, scales: jax.Array, x_scale: jax.Array | None
) -> jax.Array:
    groups = scales.shape[0]
    if x_scale is None:
        wide = weight.astype(x.dtype)
        if groups == 1:
            return _product(x, wide, jnp.float32) * scales
        stretched = wide.reshape(*weight.shape[:1], groups, -1) * scales.T[:, :, None]
        return _product(x, stretched.reshape(weight.shape).astype(x.dtype), jnp.float32)
    if groups == 1:
        return _product(x, weight, jnp.int32).astype(jnp.float32) * x_scale * scales
    by_group = jnp.einsum(
        "rgk,ogk->gro",
        x.reshape(len(x), groups, -1),
        weight.reshape(len(weight), groups, -1),
        preferred_element_type=jnp.int32,
    )
    return jnp.sum(by_group * scales[:, None], axis=0) * x_scale


def _product(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, preferred_element_type=dtype)
