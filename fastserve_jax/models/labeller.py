"""A decoder that says which label a text has, by what its last token knows: it has seen all others
(Radford et al., "GPT", 2018, section 3.2). No pages, no files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import ModelConfig
from .decoder import Decoder, State
from .layers import Linear
from .precision import Precision
from .whole import hidden_at, place_whole


class Labeller(Decoder):
    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(config, Precision(dtype))
        self.classifier = Linear(len(config.labels), config.hidden_size, dtype, dtype)

    def logits(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """tokens [texts, n] int32, of which the first `lengths` are real -> [texts, labels]
        float32. Kinds of segment are an encoder's, and are not looked at."""

        def last(tokens: jax.Array, length: jax.Array) -> jax.Array:
            at = place_whole(jnp.zeros_like(tokens))
            hidden = hidden_at(self, self.config, tokens, at, remat=remat)
            return hidden[jnp.maximum(length - 1, 0)]

        known = jax.vmap(last)(tokens, lengths)
        return self.classifier(known.astype(jnp.float32), jnp.int32(0))


def abstract_labeller(
    config: ModelConfig, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Labeller], State]:
    """Its graph and its parameters as ShapeDtypeStructs."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Labeller(config, dtype)))
    return graph, state
