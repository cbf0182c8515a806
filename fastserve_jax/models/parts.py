"""How a decoder is divided among devices: what each has of it, and what joins their results.

Each device runs the decoder of its part (Shoeybi et al., "Megatron-LM", 2019, section 3): some of
the heads, of the inner columns and of the vocabulary. What comes out of attention and out of the
MLP is summed, twice a layer. A KV head that must serve more devices than there are is on several.
A fused matrix holds the parts behind each other, each with its own queries, keys and values.
Knows names of axes, no mesh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from jax import lax

from fastserve_jax.errors import ConfigError

from .config import ModelConfig

MODEL = "model"  # the mesh axis
# Axes of parameters that are divided along it; the first two are several, behind each other.
QKV, GATES, HEADS, INNER, VOCAB = "qkv", "gates", "heads", "inner", "vocab"

type Axes = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    count: int = 1

    def of(self, config: ModelConfig) -> ModelConfig:
        """What each has, as a model of its own. Raises ConfigError where it does not divide."""
        heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
        if heads % self.count or inner % self.count:
            raise ConfigError(
                f"{heads} heads and {inner} inner columns do not divide among {self.count} devices"
            )
        if kv_heads % self.count and self.count % kv_heads:
            raise ConfigError(
                f"{kv_heads} KV heads do not divide among {self.count} devices, nor these among "
                "the heads"
            )
        return replace(
            config,
            num_heads=heads // self.count,
            num_kv_heads=max(1, kv_heads // self.count),
            intermediate_size=inner // self.count,
            vocab_size=self._vocab(config),
        )

    def _vocab(self, config: ModelConfig) -> int:
        divides = config.vocab_size % self.count == 0
        return config.vocab_size // self.count if divides else config.vocab_size

    def ranges(self, axis: str, config: ModelConfig, part: int) -> tuple[tuple[int, int], ...]:
        """Where along `axis` of the whole lies what `part` has, in its order."""
        own, dim, kv_heads = self.of(config), config.head_dim, config.num_kv_heads

        def run(length: int, begin: int = 0) -> tuple[int, int]:
            """Its share of what begins there, of which each has so much."""
            return begin + part * length, begin + (part + 1) * length

        heads, inner = run(own.num_heads * dim), run(own.intermediate_size)
        first = part * kv_heads // self.count
        keys, values = (
            (config.num_heads + at + first) * dim for at in (0, kv_heads)
        )  # where they begin
        own_kv = own.num_kv_heads * dim
        of_axis = {
            QKV: (heads, (keys, keys + own_kv), (values, values + own_kv)),
            GATES: (inner, run(own.intermediate_size, config.intermediate_size)),
            HEADS: (heads,),
            INNER: (inner,),
            VOCAB: (run(own.vocab_size),),
        }
        return of_axis[axis]

    def axes(self, *axes: str | None) -> Axes:
        """Those of a parameter, by which it is divided."""
        return axes if self.count > 1 else (None,) * len(axes)

    def sum(self, x: jax.Array) -> jax.Array:
        """Of all parts, in each."""
        if self.count == 1:
            return x
        total: jax.Array = lax.psum(x, MODEL)  # type: ignore[no-untyped-call]
        return total

    def own(self) -> jax.Array:
        """Which of them this one is."""
        index: jax.Array = lax.axis_index(MODEL)
        return index

    def joined(self, logits: jax.Array, vocab: int) -> jax.Array:
        """[rows, own] of the vocabulary -> [rows, vocab]."""
        if logits.shape[-1] == vocab:
            return logits
        whole: jax.Array = lax.all_gather(logits, MODEL, axis=logits.ndim - 1, tiled=True)
        return whole


WHOLE = Parts()
