"""An encoder of texts (Devlin et al., "BERT", 2018): every token sees all others of its text, and
what comes out is pooled to one vector. Arrays in, arrays out; no pages, no files.

The same parts as the decoder's, but normed after they are added, and with positions and kinds of
segment looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .layers import Embedding, LayerNorm, Linear

type State = nnx.State[Any, Any]  # parameters by path


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_context: int
    norm_eps: float
    segment_kinds: int = 2
    pooling: str = "mean"  # or "first"
    is_normed: bool = True  # vectors of length one
    family: str = "bert"
    labels: tuple[str, ...] = ()  # of a classifier
    # What files of decoders are asked for.
    num_experts: ClassVar[int] = 0
    tied_head: ClassVar[bool] = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class EncoderLayer(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: DTypeLike) -> None:
        size, inner, eps = config.hidden_size, config.intermediate_size, config.norm_eps
        self.qkv = Linear(3 * size, size, dtype, dtype)
        self.out = Linear(size, size, dtype, dtype)
        self.attn_norm = LayerNorm(size, eps, dtype)
        self.up = Linear(inner, size, dtype, dtype)
        self.down = Linear(size, inner, dtype, dtype)
        self.mlp_norm = LayerNorm(size, eps, dtype)
        self.config, self.dtype = config, dtype

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x [texts, n, hidden_size] float32, mask [texts, n] of real tokens -> the same as x."""
        x = self.attn_norm(x + self.out(self._mix(x, mask), jnp.int32(0)))
        inner = jax.nn.gelu(self.up(x, jnp.int32(0)), approximate=False)
        return self.mlp_norm(x + self.down(inner, jnp.int32(0)))

    def _mix(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], 3, self.config.num_heads, self.config.head_dim)
        heads = self.qkv(x, jnp.int32(0)).reshape(shape).astype(self.dtype)
        q, k, v = (heads[:, :, part] for part in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        return mixed.reshape(x.shape)


class Encoder(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: DTypeLike) -> None:
        size = config.hidden_size
        self.embed = Embedding(config.vocab_size, size, dtype)
        self.positions = Embedding(config.max_context, size, dtype)
        self.segments = Embedding(config.segment_kinds, size, dtype)
        self.embed_norm = LayerNorm(size, config.norm_eps, dtype)
        self.layers = nnx.List([EncoderLayer(config, dtype) for _ in range(config.num_layers)])
        if config.labels:
            self.classifier = Linear(len(config.labels), size, dtype, dtype)
        self.config, self.dtype = config, dtype

    def __call__(
        self, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """tokens [texts, n] int32, of which the first `lengths` are real, and of each its kind of
        segment -> one vector for each text [texts, hidden_size] float32, not normed yet."""
        count = tokens.shape[1]
        mask = jnp.arange(count) < lengths[:, None]
        x = self.embed(tokens) + self.positions(jnp.arange(count))
        x = x + self.segments(jnp.zeros_like(tokens) if segments is None else segments)
        x = self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        if self.config.pooling == "first":
            return x[:, 0]
        total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
        return total / jnp.maximum(lengths[:, None], 1)

    def vectors(
        self, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """As they are compared: of length one where the model's makers norm them."""
        pooled = self(tokens, lengths, segments)
        if not self.config.is_normed:
            return pooled
        length = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled / jnp.maximum(length, 1e-12)

    def logits(
        self, tokens: jax.Array, lengths: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """[texts, labels] float32, of a classifier."""
        return self.classifier(self(tokens, lengths, segments), jnp.int32(0))


def abstract_encoder(
    config: EncoderConfig, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Encoder], State]:
    """Its graph and its parameters as ShapeDtypeStructs."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Encoder(config, dtype)))
    return graph, state
