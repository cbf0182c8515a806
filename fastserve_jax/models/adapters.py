"""Small matrices beside a decoder's, several sets of them, each row of a step with its own (Hu et
al., "LoRA", 2021). Knows which shapes there are and how they are applied, no names and no files.

All sets lie behind each other in one pair of matrices: x goes through the first of every set in one
product, what is not of the row's own set becomes zero, and the second adds up the rest. So rows of
any sets are one batch, nothing is gathered, and a row's sum does not hang on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """For so many sets of at most this rank."""

    count: int = 0  # 0: there are none
    rank: int = 0

    @property
    def width(self) -> int:
        return self.count * self.rank


NO_ROOM = AdapterRoom()


class Pair(NamedTuple):
    """Beside one matrix [out, in], whose outputs are of `parts` behind each other (queries, keys,
    values), each with matrices of its own. What scales them is in `b`."""

    a: jax.Array  # [parts, width, in]
    b: tuple[jax.Array, ...]  # [out of the part, width] each


type Pairs = dict[str, Pair]  # of one layer, by matrix: "attn.qkv"
type Adapters = list[Pairs]


class Added(NamedTuple):
    """What a matrix's pair adds to a step's tokens."""

    pair: Pair
    own: jax.Array  # [tokens, width] bool: columns of the token's set

    def __call__(self, x: jax.Array) -> jax.Array:
        """[tokens, in] -> [tokens, out] float32."""
        a, b = self.pair
        parts, width, size = a.shape
        inner = _product(x, a.reshape(parts * width, size)).reshape(len(x), parts, width)
        inner = jnp.where(self.own[:, None], inner, 0)
        return jnp.concatenate(
            [_product(inner[:, part], of_part) for part, of_part in enumerate(b)], axis=-1
        )


class Lora(NamedTuple):
    """One layer's pairs, and whose columns each token may use."""

    pairs: Pairs
    own: jax.Array

    def of(self, name: str) -> Added | None:
        return Added(self.pairs[name], self.own) if name in self.pairs else None


def own_columns(index: jax.Array, room: AdapterRoom) -> jax.Array:
    """index [tokens] int32, from 1, 0 for none -> [tokens, width] bool."""
    return index[:, None] == 1 + jnp.arange(room.width, dtype=jnp.int32) // room.rank


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(matrix.dtype), matrix, axes, preferred_element_type=jnp.float32
    )


def matrices(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Those of a layer that have pairs: inputs, and outputs of each part. Experts have none."""
    size, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    found: dict[str, tuple[int, tuple[int, ...]]] = {
        "attn.qkv": (size, (queries, keys, keys)),
        "attn.out": (queries, (size,)),
    }
    if config.num_experts:
        return found
    first = (
        {"mlp.gate_up": (size, (inner, inner))}
        if config.gated_mlp
        else {"mlp.up": (size, (inner,))}
    )
    return {**found, **first, "mlp.down": (inner, (size,))}


def empty_adapters(config: ModelConfig, room: AdapterRoom, dtype: DTypeLike) -> Adapters:
    """Sets that add nothing."""
    return [
        {
            name: Pair(
                jnp.zeros((len(parts), room.width, size), dtype),
                tuple(jnp.zeros((out, room.width), dtype) for out in parts),
            )
            for name, (size, parts) in matrices(config).items()
        }
        for _ in range(config.num_layers)
    ]


def put(adapters: Adapters, index: jax.Array, one: Adapters) -> Adapters:
    """With the set `one`, whose width is one's rank, at `index` from 1."""

    def within(pairs: Pairs, own: Pairs) -> Pairs:
        return {name: _put(pair, index, own[name]) for name, pair in pairs.items()}

    return [within(*both) for both in zip(adapters, one, strict=True)]


def _put(pair: Pair, index: jax.Array, own: Pair) -> Pair:
    rank = own.a.shape[1]
    update, at = jax.lax.dynamic_update_slice_in_dim, (index - 1) * rank
    return Pair(
        update(pair.a, own.a, at, 1),
        tuple(update(b, of_own, at, 1) for b, of_own in zip(pair.b, own.b, strict=True)),
    )
