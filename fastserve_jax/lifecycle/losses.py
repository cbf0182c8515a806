"""What training makes small: how little a model expects of a token, or of a label.

Each loss is a sum over what is learned and how much that is, so that batches of any size add up to
the same. Arrays by canonical name go in; no pages, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Decoder, State, abstract, fill
from fastserve_jax.models.encoder import EncoderConfig, abstract_encoder
from fastserve_jax.models.labeller import abstract_labeller
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.whole import logits_of

type Arrays = Mapping[str, jax.Array]
type Loss = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # nats, (how many count, and are right)
type Each = tuple[jax.Array, jax.Array, jax.Array]  # nats, whether it counts, and is right


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder to be trained: its graph computes in `dtype`, whatever its parameters are kept in.
    With `remat` layers are computed again for their gradients."""

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def graph(self) -> nnx.GraphDef[Decoder]:
        return abstract(self.config, Precision(self.dtype))[0]

    @property
    def empty(self) -> State:
        """Parameters as shapes, in float32: what an optimiser adds to is not rounded away."""
        return abstract(self.config, Precision(jnp.float32))[1]

    def filled(self, arrays: Arrays) -> State:
        return fill(self.empty, {name: array.astype(self.dtype) for name, array in arrays.items()})

    def logits(self, arrays: Arrays, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """[rows, n] int32 each -> [rows, n, vocab_size] float32."""
        graph, state = self.graph, self.filled(arrays)

        def one(tokens: jax.Array, segments: jax.Array) -> jax.Array:
            return logits_of(graph, self.config, state, tokens, segments, remat=self.remat)

        made: jax.Array = jax.vmap(one)(tokens, segments)
        return made

    def loss(self, arrays: Arrays, batch: Arrays) -> Loss:
        """Of each token from those before it of its document, padding and what is only read left
        out."""
        return cross_entropy(*self.expected(arrays, batch))

    def each(self, arrays: Arrays, batch: Arrays) -> Each:
        """[rows, n - 1]: of the tokens behind the first."""
        return _each(*self.expected(arrays, batch))

    def expected(self, arrays: Arrays, batch: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits [rows, n - 1, vocab_size]; the token that came, and whether it counts."""
        tokens, segments = batch["tokens"].astype(jnp.int32), batch["segments"].astype(jnp.int32)
        logits = self.logits(arrays, tokens, segments)[:, :-1]
        return logits, tokens[:, 1:], behind(segments, batch["learned"])


@dataclass(frozen=True, slots=True)
class Classifier:
    """An encoder, or a decoder, that says which label a text has."""

    config: EncoderConfig | ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False  # of a decoder

    def loss(self, arrays: Arrays, batch: Arrays) -> Loss:
        lengths = batch["lengths"]
        return cross_entropy(self.logits(arrays, batch), batch["labels"], lengths > 0)

    def logits(self, arrays: Arrays, batch: Arrays) -> jax.Array:
        """[texts, labels] float32."""
        tokens, lengths = batch["tokens"].astype(jnp.int32), batch["lengths"]
        given = {name: array.astype(self.dtype) for name, array in arrays.items()}
        if isinstance(self.config, EncoderConfig):
            graph, _ = abstract_encoder(self.config, self.dtype)
            _, empty = abstract_encoder(self.config, jnp.float32)
            return nnx.merge(graph, fill(empty, given)).logits(tokens, lengths)
        decoder, _ = abstract_labeller(self.config, self.dtype)
        _, empty = abstract_labeller(self.config, jnp.float32)
        labeller = nnx.merge(decoder, fill(empty, given))
        return labeller.logits(tokens, lengths, remat=self.remat)


def behind(segments: jax.Array, learned: jax.Array) -> jax.Array:
    """[..., n] each -> [..., n - 1]: which tokens count, of those behind the first of a row."""
    return learned[..., 1:] & (segments[..., 1:] == segments[..., :-1])


def cross_entropy(logits: jax.Array, target: jax.Array, counts: jax.Array) -> Loss:
    nats, counted, right = (jnp.sum(one) for one in _each(logits, target, counts))
    return nats, (counted, right)


def _each(logits: jax.Array, target: jax.Array, counts: jax.Array) -> Each:
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    right = (jnp.argmax(logits, axis=-1) == target) & counts
    return jnp.where(counts, nats, 0), counts, right
