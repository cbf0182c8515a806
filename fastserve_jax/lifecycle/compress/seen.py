"""What goes into each matrix of a decoder, on text, layer by layer, so that one layer's is there.

    x = walk.begin(arrays)
    for each layer: seen = walk.watch(layer, arrays, x); ...; x = walk.through(layer, arrays, x)

A layer whose matrices were changed in between passes on what the changed ones make, so that the
next ones can make up for it (Frantar et al., "GPTQ", 2022, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Decoder, Layer, State, abstract, fill, rotations
from fastserve_jax.models.layers import Linear
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.whole import place_whole

type Arrays = Mapping[str, NDArray[Any]]

_EVERY = 16  # of so many inputs one is kept as it is
_MATRICES = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.up", "mlp.down")


class Seen(NamedTuple):
    """Of the inputs x [tokens, in] of a matrix, float32."""

    gram: NDArray[np.float32]  # sum of x x^T, [in, in]
    size: NDArray[np.float32]  # mean |x|, [in]
    largest: NDArray[np.float32]  # max |x|, [in]
    samples: NDArray[np.float32]  # some x, [samples, in]


class Text(NamedTuple):
    """Rows of it, [rows, context] each, as packing.py has them."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    counts: NDArray[np.bool_]  # padding does not

    @classmethod
    def of(cls, rows: Mapping[str, NDArray[Any]]) -> Text:
        segments = np.asarray(rows["segments"], np.int32)
        last = segments == segments[:, -1:]
        is_padded = ~(last & rows["learned"]).any(1)  # nothing of its last document is learned
        return cls(np.asarray(rows["tokens"], np.int32), segments, ~(last & is_padded[:, None]))


@dataclass(frozen=True)
class Walk:
    config: ModelConfig
    text: Text

    @cached_property
    def _empty(self) -> Decoder:
        return nnx.merge(*abstract(self.config, Precision(jnp.float32)))

    def begin(self, arrays: Arrays) -> jax.Array:
        """[rows, context, hidden_size]: what the first layer is given."""
        empty = self._empty
        graph, state = nnx.split(empty)
        outer = {n: a for n, a in arrays.items() if n.startswith(("embed.", "positions."))}
        flat = nnx.to_flat_state(state)
        kept = {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
        made: jax.Array = _begin(graph, fill(state, kept | outer), self.text)
        return made

    def watch(self, layer: int, arrays: Arrays, x: jax.Array) -> dict[str, Seen]:
        """By matrix: "layers.3.attn.qkv"."""
        found = jax.device_get(_watch(*self._layer(layer, arrays), *self._of(layer), x, self.text))
        tokens = self.text.counts.sum()
        return {
            f"layers.{layer}.{name}": Seen(gram, total / tokens, largest, samples)
            for name, (gram, total, largest, samples) in found.items()
        }

    def through(self, layer: int, arrays: Arrays, x: jax.Array) -> jax.Array:
        made: jax.Array = _through(*self._layer(layer, arrays), *self._of(layer), x, self.text)
        return made

    def _of(self, layer: int) -> tuple[ModelConfig, bool]:
        return self.config, self.config.window(layer) > 0

    def _layer(self, layer: int, arrays: Arrays) -> tuple[nnx.GraphDef[Layer], State]:
        begin = f"layers.{layer}."
        graph, empty = nnx.split(self._empty.layers[layer])
        own = {n.removeprefix(begin): a for n, a in arrays.items() if n.startswith(begin)}
        return graph, fill(empty, {n: jnp.asarray(a, jnp.float32) for n, a in own.items()})


def _run(
    layer: Layer,
    config: ModelConfig,
    is_local: bool,
    x: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    at = place_whole(segments)
    return layer(x, None, None, at, rotations(config, at.positions)[is_local])[0]


@partial(jax.jit, static_argnums=(0, 2, 3))
def _through(
    graph: nnx.GraphDef[Layer],
    state: State,
    config: ModelConfig,
    is_local: bool,
    x: jax.Array,
    text: Text,
) -> jax.Array:
    layer = nnx.merge(graph, state)
    made: jax.Array = jax.lax.map(
        lambda row: _run(layer, config, is_local, *row), (x, text.segments)
    )
    return made


@partial(jax.jit, static_argnums=(0, 2, 3))
def _watch(
    graph: nnx.GraphDef[Layer],
    state: State,
    config: ModelConfig,
    is_local: bool,
    x: jax.Array,
    text: Text,
) -> dict[str, tuple[jax.Array, ...]]:
    def one(
        x: jax.Array, segments: jax.Array, counts: jax.Array
    ) -> tuple[dict[str, tuple[jax.Array, ...]], dict[str, jax.Array]]:
        layer = nnx.merge(graph, state)
        sums: dict[str, tuple[jax.Array, ...]] = {}
        samples: dict[str, jax.Array] = {}

        def tell(name: str, x: jax.Array) -> None:
            x = jnp.where(counts[:, None], x.astype(jnp.float32), 0)
            size = jnp.abs(x)
            sums[name] = (x.T @ x, size.sum(0), size.max(0))
            samples[name] = x[::_EVERY]

        for name in _MATRICES:
            block, _, matrix = name.partition(".")
            linear = getattr(getattr(layer, block), matrix, None)
            if isinstance(linear, Linear):
                linear.watch = partial(tell, name)
        _run(layer, config, is_local, x, segments)
        return sums, samples

    def add(total: Any, row: Any) -> tuple[Any, Any]:
        sums, samples = one(*row)
        joined = {
            name: (gram + sums[name][0], size + sums[name][1], jnp.maximum(most, sums[name][2]))
            for name, (gram, size, most) in total.items()
        }
        return joined, samples

    rows = x, text.segments, text.counts
    shapes = jax.eval_shape(one, *(of[0] for of in rows))[0]
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, samples = jax.lax.scan(add, zero, rows)
    return {n: (*sums[n], samples[n].reshape(-1, samples[n].shape[-1])) for n in sums}


def _begin(graph: nnx.GraphDef[Decoder], state: State, text: Text) -> jax.Array:
    decoder = nnx.merge(graph, state)
    made = [
        decoder.embedded(jnp.asarray(tokens), place_whole(jnp.asarray(segments)))
        for tokens, segments in zip(text.tokens, text.segments, strict=True)
    ]
    return jnp.stack(made)
