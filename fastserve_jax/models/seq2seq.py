"""An encoder-decoder (Raffel et al., "T5", 2019) whose sequences lie in the pages of a decoder's.

A sequence is its source, the token that a target begins behind, and the target. At positions of the
source its pages hold, in each of the decoder's layers, the keys and values that cross-attention
reads; behind them those of the decoder's own. So who shares, moves or takes pages need not know.
An encoder's tokens see each other both ways: a source is in one step as a whole.

A step reads its sources, if it has any, and writes what comes of them to the pages; then it runs
its other tokens, in blocks of as many as there are rows. Both are loops, of no turn where there is
nothing to do: a loop's pages change in place, a branch's would be copied. Among sources the scores
and what comes of them are four float32 arrays of num_heads * tokens ** 2.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from pallas_kernels import ragged_paged_attention, write_kv

from . import decoder
from .config import ModelConfig, Seq2SeqConfig
from .decoder import MLP, Batch, Decoder, Place, State
from .layers import Embedding, Linear, RMSNorm
from .parts import WHOLE, Parts
from .precision import Precision

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
_BLOCK_KV = 128  # positions that are read at once


class EncoderLayer(nnx.Module):
    def __init__(self, config: Seq2SeqConfig, precision: Precision) -> None:
        size, inner, dtype = config.hidden_size, _inner(config), precision.dtype
        self.attn_norm = RMSNorm(size, config.norm_eps, dtype)
        self.qkv = Linear(3 * inner, size, dtype)
        self.out = Linear(size, inner, dtype)
        self.mlp_norm = RMSNorm(size, config.norm_eps, dtype)
        self.mlp = MLP(config, precision, "mlp", WHOLE)
        self.config, self.dtype = config, dtype

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """x [tokens, hidden_size] float32; mask [tokens, tokens] of who sees whom, bias [num_heads,
        tokens, tokens] float32 -> as x."""
        live = jnp.int32(len(x))
        q, k, v = _heads(self.qkv(x, live, norm=self.attn_norm), 3, self.config)
        # Of a row whose numbers overflowed the others must see nothing: 0 * nan is nan.
        v = jnp.where(jnp.isfinite(v), v, 0)
        q, k, v = (part.astype(self.dtype)[None] for part in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v, bias[None], mask[None, None], scale=1.0)
        x = self.out(mixed.reshape(len(x), -1), live, add=x)
        return self.mlp(x, live, self.mlp_norm, None)


class DecoderLayer(nnx.Module):
    def __init__(self, config: Seq2SeqConfig, precision: Precision) -> None:
        size, inner, dtype = config.hidden_size, _inner(config), precision.dtype
        eps = config.norm_eps
        self.attn_norm, self.cross_norm = RMSNorm(size, eps, dtype), RMSNorm(size, eps, dtype)
        self.qkv = Linear(3 * inner, size, dtype)
        self.out = Linear(size, inner, dtype)
        self.cross_q = Linear(inner, size, dtype)
        self.cross_kv = Linear(2 * inner, size, dtype)
        self.cross_out = Linear(size, inner, dtype)
        self.mlp_norm = RMSNorm(size, eps, dtype)
        self.mlp = MLP(config, precision, "mlp", WHOLE)
        self.config, self.dtype = config, dtype

    def hear(self, encoded: jax.Array, kv_pages: jax.Array, at: Place) -> jax.Array:
        """The pages with what cross-attention reads of the encoder's output."""
        k, v = _heads(self.cross_kv(encoded, jnp.int32(len(encoded))), 2, self.config)
        return write_kv(kv_pages, k, v, at.pages, at.offsets)

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        table: jax.Array,
        sources: jax.Array,
        at: Place,
        bias: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """x [n, hidden_size] float32 of tokens whose rows' pages are `table` [n, pages_per_row] and
        sources so long; bias [farthest + 1, num_heads] float32 by distance."""
        count, live = len(x), jnp.int32(len(x))
        q, k, v = _heads(self.qkv(x, live, norm=self.attn_norm), 3, self.config)
        kv_pages = write_kv(kv_pages, k, v, at.pages, at.offsets)
        mixed = attend_from(q.astype(self.dtype), kv_pages, table, sources, at.positions, bias)
        x = self.out(mixed.reshape(count, -1), live, add=x)
        (q,) = _heads(self.cross_q(x, live, norm=self.cross_norm), 1, self.config)
        each = jnp.arange(count + 1, dtype=jnp.int32)
        # To each token as to a row of its own, that ends where its source does.
        mixed = ragged_paged_attention(
            *(q.astype(self.dtype), kv_pages, sources, table, each),
            jnp.full(2, count, jnp.int32),
            scale=1.0,
        )
        x = self.cross_out(mixed.reshape(count, -1), live, add=x)
        return self.mlp(x, live, self.mlp_norm, None), kv_pages


def _inner(config: Seq2SeqConfig) -> int:
    return config.num_heads * config.head_dim


def _heads(x: jax.Array, parts: int, config: Seq2SeqConfig) -> list[jax.Array]:
    """[n, parts * num_heads * head_dim] -> of each part [n, num_heads, head_dim]."""
    split = x.reshape(len(x), parts, config.num_heads, config.head_dim)
    return [split[:, part] for part in range(parts)]


def attend_from(
    q: jax.Array,
    kv_pages: jax.Array,
    table: jax.Array,
    first: jax.Array,
    positions: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """Causal attention over pages, from some position on, with a bias by distance.

    q [n, num_heads, head_dim] at `positions` [n] sees those from `first` [n] up to its own, whose
    pages are `table` [n, pages_per_row]; bias [farthest + 1, num_heads] float32. Plain XLA: of each
    token it gathers blocks of pages, as many as the longest has. As q.
    """
    count, heads, dim = q.shape
    size = kv_pages.shape[2]
    pages_per_block = -(-_BLOCK_KV // size)
    begin = first // size

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, total, out = carry
        numbers = begin[:, None] + i * pages_per_block + jnp.arange(pages_per_block)
        pages = jnp.take_along_axis(table, jnp.minimum(numbers, table.shape[1] - 1), axis=1)
        past = (numbers[:, :, None] * size + jnp.arange(size)).reshape(count, -1)
        found = jnp.moveaxis(kv_pages[pages], 2, 1).reshape(count, heads, past.shape[1], -1)
        seen = (past >= first[:, None]) & (past <= positions[:, None])
        # What is not seen may be another's, or nothing yet; 0 * nan is nan.
        values = jnp.where(seen[:, None, :, None], found[..., dim : 2 * dim], 0).astype(q.dtype)
        keys = found[..., :dim].astype(q.dtype)
        scores = jnp.einsum("nhd,nhsd->nhs", q, keys, preferred_element_type=jnp.float32)
        distance = jnp.clip(positions[:, None] - past, 0, len(bias) - 1)
        scores = jnp.where(seen[:, None], scores + jnp.moveaxis(bias[distance], 2, 1), _FAR)
        higher = jnp.maximum(best, scores.max(-1))
        weights = jnp.where(seen[:, None], jnp.exp(scores - higher[..., None]), 0)
        fade = jnp.exp(best - higher)
        gained = jnp.einsum(
            "nhs,nhsd->nhd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        return higher, total * fade + weights.sum(-1), out * fade[..., None] + gained

    longest = jnp.max(positions - begin * size) + 1
    block = pages_per_block * size
    start = (jnp.full((count, heads), _FAR), jnp.zeros((count, heads)), jnp.zeros(q.shape))
    _, total, out = lax.fori_loop(0, (longest + block - 1) // block, step, start)
    mixed: jax.Array = out / jnp.where(total == 0, 1, total)[..., None]
    return mixed.astype(q.dtype)


def buckets(count: int, farthest: int) -> NDArray[np.int32]:
    """[farthest + 1]: which of `count` each distance in one direction falls into. Half of them are
    for one distance each, the others for logarithmically more, the last for all that are farther
    (section 2.1; float32, as the trained models have it)."""
    exact = count // 2
    distance = np.arange(farthest + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / exact
    turns = np.log(ratio) / np.float32(math.log(farthest / exact)) * np.float32(count - exact)
    beyond = np.minimum(exact + turns.astype(np.int32), count - 1)
    return np.where(distance < exact, distance, beyond).astype(np.int32)


class Seq2Seq(nnx.Module):
    """Tokens and pages in, hidden states and pages out, as `Decoder`."""

    def __init__(self, config: Seq2SeqConfig, precision: Precision) -> None:
        size, dtype = config.hidden_size, precision.dtype
        kinds, heads = config.position_buckets, config.num_heads
        self.embed = Embedding(config.vocab_size, size, dtype)
        self.encoder_bias = Embedding(kinds, heads, dtype)
        self.encoder = nnx.List(
            [EncoderLayer(config, precision) for _ in range(config.encoder_layers)]
        )
        self.encoder_norm = RMSNorm(size, config.norm_eps, dtype)
        self.decoder_bias = Embedding(kinds, heads, dtype)
        self.decoder = nnx.List([DecoderLayer(config, precision) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(size, config.norm_eps, dtype)
        if not config.tied_head:
            self.head = Embedding(config.vocab_size, size, dtype)
        self.config, self.dtype = config, dtype

    def __call__(
        self, tokens: jax.Array, kv_pages: list[jax.Array], batch: Batch, at: Place
    ) -> tuple[jax.Array, list[jax.Array]]:
        """tokens [n] int32 -> hidden [n, hidden_size] in the model's dtype, ready for the head; of
        tokens of sources it is zero."""
        count = len(tokens)
        assert batch.sources is not None, "how long the sources are"
        sources = jnp.asarray(batch.sources)[at.rows]
        is_real = jnp.arange(count) < at.live
        is_read = is_real & (at.positions < sources)
        kv_pages = lax.fori_loop(
            0,
            jnp.any(is_read).astype(jnp.int32),
            lambda _, pages: self._listen(tokens, pages, at, is_read),
            kv_pages,
        )
        is_written = is_real & ~is_read
        size = min(count, len(batch.slots))
        order = jnp.argsort(~is_written, stable=True)
        order = jnp.pad(order, (0, size), constant_values=count)  # a last block may reach past it
        written = jnp.sum(is_written, dtype=jnp.int32)
        table = jnp.asarray(batch.page_table)

        def block(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            hidden, pages = carry
            own = lax.dynamic_slice_in_dim(order, i * size, size)
            own = jnp.where(i * size + jnp.arange(size) < written, own, count)
            token, source, row, position, page, offset = (
                jnp.take(part, own, mode="clip")
                for part in (tokens, sources, at.rows, at.positions, at.pages, at.offsets)
            )
            page = jnp.where(own < count, page, pages[0].shape[0])
            there = Place(row, position, page, offset, at.live)
            x, pages = self._tell(token, pages, table[row], source, there)
            return hidden.at[own].set(x, mode="drop"), pages

        hidden = jnp.zeros((count, self.config.hidden_size), self.dtype)
        blocks = (written + size - 1) // size
        hidden, kv_pages = lax.fori_loop(0, blocks, block, (hidden, kv_pages))
        return hidden, kv_pages

    def _listen(
        self, tokens: jax.Array, kv_pages: list[jax.Array], at: Place, is_read: jax.Array
    ) -> list[jax.Array]:
        """The sources through the encoder, and what the decoder's layers hear of them to pages."""
        config = self.config
        mask = is_read & (at.rows[:, None] == at.rows)
        ahead = at.positions - at.positions[:, None]
        half = config.position_buckets // 2
        kinds = jnp.asarray(buckets(half, config.farthest))[
            jnp.minimum(jnp.abs(ahead), config.farthest)
        ]
        bias = self.encoder_bias(kinds + jnp.where(ahead > 0, half, 0))
        bias = jnp.moveaxis(bias, 2, 0)
        x = self.embed(tokens)
        for layer in self.encoder:
            x = _run_encoder_layer(*nnx.split(layer), x, mask, bias)
        encoded = self.encoder_norm(x)
        at = at._replace(pages=jnp.where(is_read, at.pages, kv_pages[0].shape[0]))
        return [
            _hear(*nnx.split(layer), encoded, pages, at)
            for layer, pages in zip(self.decoder, kv_pages, strict=True)
        ]

    def _tell(
        self,
        tokens: jax.Array,
        kv_pages: list[jax.Array],
        table: jax.Array,
        sources: jax.Array,
        at: Place,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Tokens of targets through the decoder -> hidden [n, hidden_size], pages."""
        config = self.config
        bias = self.decoder_bias(jnp.asarray(buckets(config.position_buckets, config.farthest)))
        x, written = self.embed(tokens), []
        for layer, pages in zip(self.decoder, kv_pages, strict=True):
            x, pages = _run_decoder_layer(*nnx.split(layer), x, pages, table, sources, at, bias)
            written.append(pages)
        x = self.final_norm(x)
        # An embedding that is the head too is too large for it by this (Mesh TensorFlow's T5).
        x = x * config.hidden_size**-0.5 if config.scaled_head else x
        return x.astype(self.dtype), written


def _encoder_layer(graph: nnx.GraphDef[EncoderLayer], state: State, *given: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(*given)


def _heard(
    graph: nnx.GraphDef[DecoderLayer],
    state: State,
    encoded: jax.Array,
    kv_pages: jax.Array,
    at: Place,
) -> jax.Array:
    return nnx.merge(graph, state).hear(encoded, kv_pages, at)


def _decoder_layer(
    graph: nnx.GraphDef[DecoderLayer], state: State, *given: Any
) -> tuple[jax.Array, jax.Array]:
    return nnx.merge(graph, state)(*given)


# Layers of one kind are traced and lowered once, not once each: start-up counts.
_run_encoder_layer = jax.jit(_encoder_layer, static_argnums=0)
_hear = jax.jit(_heard, static_argnums=0)
_run_decoder_layer = jax.jit(_decoder_layer, static_argnums=0)


def abstract(
    config: ModelConfig, precision: Precision, parts: Parts = WHOLE
) -> tuple[nnx.GraphDef[Decoder] | nnx.GraphDef[Seq2Seq], State]:
    """Whatever `config` is one of, as `decoder.abstract`. Raises ConfigError."""
    if not isinstance(config, Seq2SeqConfig):
        return decoder.abstract(config, precision, parts)
    if precision.int8:
        raise ConfigError(f"model.dtype int8 is not for {config.family}: take bf16 or f32")
    if parts.count > 1:
        raise ConfigError(f"{config.family} runs on one device, and not on a mesh of {parts.count}")
    graph, state = nnx.split(nnx.eval_shape(lambda: Seq2Seq(config, precision)))
    return graph, state
