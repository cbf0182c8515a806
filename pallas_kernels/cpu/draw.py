"""One token from each row of logits, the highest or one by chance; see draw.cc."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rules(NamedTuple):
    """Temperature, then min_p, top_k and top_p cuts, then one draw from what is left."""

    temperature: jax.Array  # [rows] float32; 0 takes the first of the highest
    top_p: jax.Array  # [rows] float32
    min_p: jax.Array  # [rows] float32
    top_k: jax.Array  # [rows] int32; 0 for all
    seeds: jax.Array  # [rows, 2] uint32: random bits, all that chance there is


def draw(logits: jax.Array, live: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """logits [rows, vocab] float32 -> each row's highest [rows] float32, NaN where the row holds
    one, and its token [rows] int32, drawn exactly; zeros for rows from `live` (int32 scalar) on."""
    return _call("fastserve_draw", live, logits, rules=rules)


def int8_draw(
    x: jax.Array, weight: jax.Array, scale: jax.Array, live: jax.Array, rules: Rules
) -> tuple[jax.Array, jax.Array]:
    """`draw` from the rows of `int8_matmul`, which are not given to the caller."""
    return _call("fastserve_int8_draw", live, x.astype(jnp.float32), weight, scale, rules=rules)


def _call(
    name: str, live: jax.Array, *given: jax.Array, rules: Rules
) -> tuple[jax.Array, jax.Array]:
    shapes = [
        jax.ShapeDtypeStruct(rules.temperature.shape, kind)  # type: ignore[no-untyped-call]
        for kind in (jnp.float32, jnp.int32)
    ]
    best, tokens = jax.ffi.ffi_call(name, shapes)(live.reshape(1), *given, *rules)
    return best, tokens
