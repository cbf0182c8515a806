"""One token from each row of logits, the highest or one by chance; see draw.cc."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def draw(
    logits: jax.Array,
    live: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    top_k: jax.Array,
    seeds: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Temperature, then min_p, top_k and top_p cuts, then one draw from what is left. Exact.

    logits                     [rows, vocab] float32
    live                       int32 scalar; rows from it on get zeros
    temperature, top_p, min_p  [rows] float32; temperature 0 takes the first of the highest
    top_k                      [rows] int32, 0 for all
    seeds                      [rows, 2] uint32, random bits: all that chance there is
    Returns each row's highest logit [rows] float32, NaN where the row holds one, and its token.
    """
    kinds = (jnp.float32, jnp.int32)
    shapes = [jax.ShapeDtypeStruct(temperature.shape, kind) for kind in kinds]  # type: ignore[no-untyped-call]
    call = jax.ffi.ffi_call("fastserve_draw", shapes)
    best, tokens = call(live.reshape(1), logits, temperature, top_p, min_p, top_k, seeds)
    return best, tokens
