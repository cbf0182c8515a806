"""Sequences seen whole, as training and scoring have them: no pages, nothing kept.

The same modules as the step that serves, so what is trained is what is served. Rows may lie packed
behind each other in one sequence; a token sees those before it of its own row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig
from .decoder import Decoder, Layer, Place, State, fill, head_of, rotations
from .layers import Rotation, project


def logits_of(
    graph: nnx.GraphDef[Decoder],
    config: ModelConfig,
    state: State,
    tokens: jax.Array,
    rows: jax.Array,
    *,
    remat: bool = False,
) -> jax.Array:
    """tokens, rows [n] int32 -> [n, vocab_size] float32. `rows` never falls. With `remat` each
    layer is computed again for its gradient, instead of kept (Chen et al., 2016)."""
    return logits_at(graph, config, state, tokens, place_whole(rows), remat=remat)


def logits_at(
    graph: nnx.GraphDef[Decoder],
    config: ModelConfig,
    state: State,
    tokens: jax.Array,
    at: Place,
    *,
    remat: bool = False,
) -> jax.Array:
    """The same of tokens whose place is known."""
    hidden = hidden_at(nnx.merge(graph, state), config, tokens, at, remat=remat)
    return project(hidden, head_of(config, state), tokens.shape[0])


def hidden_at(
    decoder: Decoder, config: ModelConfig, tokens: jax.Array, at: Place, *, remat: bool = False
) -> jax.Array:
    """-> [n, hidden_size] in the model's dtype, normed for the head."""
    x, turns = decoder.embedded(tokens, at), rotations(config, at.positions)
    run = jax.checkpoint(_run, static_argnums=0) if remat else _run
    for i, layer in enumerate(decoder.layers):
        x = run(*nnx.split(layer), x, at, turns[config.window(i) > 0])
    return decoder.final_norm(x).astype(decoder.dtype)


def place_alone(tokens: jax.Array) -> Place:
    """Of one sequence, by no more than adding up: what every exporter can write down, however long
    it is."""
    nothing = tokens * 0
    positions = jax.lax.cumsum(nothing + 1) - 1
    return Place(nothing, positions, nothing, nothing, jnp.int32(tokens.shape[0]))


def place_whole(rows: jax.Array) -> Place:
    count = rows.shape[0]
    at = jnp.arange(count, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    positions = at - jax.lax.cummax(jnp.where(begins, at, 0))
    nowhere = jnp.zeros(count, jnp.int32)
    return Place(rows, positions, nowhere, nowhere, jnp.int32(count))


def _run(
    graph: nnx.GraphDef[Layer], state: State, x: jax.Array, at: Place, turn: Rotation | None
) -> jax.Array:
    return nnx.merge(graph, state)(x, None, None, at, turn)[0]


def filled(empty: State, arrays: dict[str, jax.Array], dtype: Any) -> State:
    """The state that has them, as `dtype`; the cast is part of what is differentiated."""
    return fill(empty, {name: array.astype(dtype) for name, array in arrays.items()})
