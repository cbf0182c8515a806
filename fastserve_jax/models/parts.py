"""How a decoder is divided among devices: what each has of it, and what joins their results.

Each device runs the decoder of its part (Shoeybi et al., "Megatron-LM", 2019, section 3): some of
the heads, of the inner columns and of the vocabulary; of experts some, or a part of each. What
comes out of attention and out of the MLP is summed, twice a layer. A KV head that must serve more
devices than there are is on several. A fused matrix holds the parts behind each other, each with
its own queries, keys and values. Knows names of axes, no mesh.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from jax import lax

from fastserve_jax.errors import ConfigError

from .config import ModelConfig

EXPERT, MODEL = "expert", "model"  # the mesh axes, over which all is divided but for experts
# Axes of parameters that are divided; the first two are several, behind each other.
QKV, GATES, HEADS, INNER, VOCAB = "qkv", "gates", "heads", "inner", "vocab"
EXPERTS, EXPERT_INNER = "experts", "expert_inner"  # by one of the mesh's each

_ALL = (EXPERT, MODEL)

type Axes = tuple[str | None, ...]
type Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """`count` in all, by which experts are divided in `experts` groups."""

    count: int = 1
    experts: int = 1

    @property
    def of_expert(self) -> int:
        """Parts of one."""
        return self.count // self.experts

    def of(self, config: ModelConfig) -> ModelConfig:
        """What each has, as a model of its own. Raises ConfigError where it does not divide."""
        heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
        if self.experts > 1 and (not config.num_experts or config.num_experts % self.experts):
            raise ConfigError(
                f"{config.num_experts} experts do not divide among {self.experts} devices"
            )
        by = self.of_expert if config.num_experts else self.count
        if heads % self.count or inner % by:
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
            intermediate_size=inner // by,
            num_experts=config.num_experts // self.experts,
            vocab_size=self._vocab(config),
        )

    def _vocab(self, config: ModelConfig) -> int:
        divides = config.vocab_size % self.count == 0
        return config.vocab_size // self.count if divides else config.vocab_size

    def ranges(self, axis: str, config: ModelConfig, part: int) -> Ranges:
        """Where along `axis` of the whole lies what `part` has, in its order."""
        own, dim, kv_heads = self.of(config), config.head_dim, config.num_kv_heads
        group, within = divmod(part, self.of_expert)

        def run(length: int, begin: int = 0, number: int = part) -> tuple[int, int]:
            """The share with that number of what begins there, of which each has so much."""
            return begin + number * length, begin + (number + 1) * length

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
            EXPERTS: (run(own.num_experts, number=group),),
            EXPERT_INNER: (run(own.intermediate_size, number=within),),
        }
        return of_axis[axis]

    def axes(self, *axes: str | None) -> Axes:
        """Those of a parameter, by which it is divided."""
        return axes if self.count > 1 else (None,) * len(axes)

    def sum(self, x: jax.Array) -> jax.Array:
        """Of all parts, in each."""
        if self.count == 1:
            return x
        total: jax.Array = lax.psum(x, _ALL)  # type: ignore[no-untyped-call]
        return total

    def own(self) -> jax.Array:
        """Which of them this one is."""
        index: jax.Array = lax.axis_index(_ALL)
        return index

    def own_experts(self) -> jax.Array | int:
        """Which group of them this one has."""
        if self.experts == 1:
            return 0
        index: jax.Array = lax.axis_index(EXPERT)
        return index

    def joined(self, logits: jax.Array, vocab: int) -> jax.Array:
        """[rows, own] of the vocabulary -> [rows, vocab]."""
        if logits.shape[-1] == vocab:
            return logits
        whole: jax.Array = lax.all_gather(logits, _ALL, axis=logits.ndim - 1, tiled=True)
        return whole


WHOLE = Parts()
