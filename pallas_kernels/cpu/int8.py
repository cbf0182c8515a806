"""Products of float rows with an int8 matrix, and what stands around them; see int8.cc."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_AFTER_NOTHING, _AFTER_ADD, _AFTER_NORM_ADD = range(3)
_GATED = {"gelu_tanh": 2, "silu": 3}


class Norm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight, the mean along the last axis."""

    weight: jax.Array  # [size] float32 or bfloat16
    eps: float


def int8_matmul(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    live: jax.Array,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    add: jax.Array | None = None,
    add_norm: Norm | None = None,
) -> jax.Array:
    """x [rows, size] float32, spread and rounded row by row, times int8 [outputs, size] with
    `scale` [outputs] -> [rows, outputs] float32; rows from `live` (int32 scalar) on are zeros.

    norm      what x goes through first
    gate      "gelu_tanh" or "silu": x is [rows, 2 size], and gate(left half) * right is taken
    add       [rows, outputs], added to the product
    add_norm  what the product goes through before that
    """
    assert norm is None or gate is None
    assert add is not None or add_norm is None
    before = 1 if norm else _GATED[gate] if gate else 0
    after = _AFTER_NOTHING if add is None else _AFTER_NORM_ADD if add_norm else _AFTER_ADD
    assert norm is None or add_norm is None or norm.eps == add_norm.eps
    nothing = jnp.zeros((0,), jnp.float32)
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)  # type: ignore[no-untyped-call]
    result: jax.Array = jax.ffi.ffi_call("fastserve_int8_matmul", out)(
        live.reshape(1),
        x.astype(jnp.float32),
        weight,
        scale,
        norm.weight if norm else nothing,
        add_norm.weight if add_norm else nothing,
        nothing if add is None else add,
        before=np.int32(before),
        after=np.int32(after),
        eps=np.float32((norm or add_norm or Norm(nothing, 0.0)).eps),
    )
    return result


def int8_best(
    x: jax.Array, weight: jax.Array, scale: jax.Array, live: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each row of `int8_matmul` the largest value, NaN where the row holds one, and the first
    output that has it: [rows] float32 and int32. The product itself is never in memory."""
    shapes = [jax.ShapeDtypeStruct((x.shape[0],), kind) for kind in (jnp.float32, jnp.int32)]  # type: ignore[no-untyped-call]
    call = jax.ffi.ffi_call("fastserve_int8_best", shapes)
    best, index = call(live.reshape(1), x.astype(jnp.float32), weight, scale)
    return best, index
