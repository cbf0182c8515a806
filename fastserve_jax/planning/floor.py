"""How fast a step can be at the most: bytes over bandwidth, operations over rate. Arithmetic only.

A floor, not a forecast: memory and products at once at the rates their maker states, collectives
after them at the links' rate, and nothing else at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve_jax.chips import Rates
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.parts import Parts

_FLOAT32 = 4  # bytes of what is summed over devices


@dataclass(frozen=True, slots=True)
class Work:
    """Of one device in one step."""

    bytes_read: int  # weights, and the pages that are attended
    operations: int
    link_bytes: int  # sent to the next of a ring

    def floor_s(self, rates: Rates, is_int8: bool) -> float:
        rate = rates.int8_operations if is_int8 else rates.operations
        return max(self.bytes_read / rates.bandwidth, self.operations / rate) + (
            self.link_bytes / rates.link
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What work is counted from, all of one device but for the model."""

    config: ModelConfig
    parts: Parts
    weight_bytes: int
    matrix_elements: int  # that a token is multiplied with; without the head's and experts'
    expert_bytes: int  # of weight_bytes: of all experts
    expert_elements: int
    head_elements: int
    embed_bytes: int  # of a table that is only looked up
    token_bytes: int  # of one token's keys and values in one layer

    def work(self, rows: int, tokens: int, context: int) -> Work:
        """Of `tokens` new tokens, `rows` of which are a sequence's last, each after `context`."""
        config, own = self.config, self.parts.of(self.config)
        seen = [
            min(window, context) if (window := config.window(i)) else context
            for i in range(config.num_layers)
        ]
        attended = 4 * own.num_heads * config.head_dim * sum(seen)
        multiplied = self.matrix_elements + self.expert_elements * self._share
        products = 2 * (round(multiplied * tokens) + self.head_elements * rows)
        # Experts that nobody chose are not read; who is chosen is as if by chance.
        idle_bytes = round(self.expert_bytes * (1 - self._share) ** tokens)
        read = self.weight_bytes - self.embed_bytes - idle_bytes
        return Work(
            bytes_read=read + rows * sum(seen) * self.token_bytes,
            operations=products + tokens * attended,
            link_bytes=self._link_bytes(rows, tokens),
        )

    @property
    def _share(self) -> float:
        """Of all experts, those that a token goes through."""
        config = self.config
        return config.experts_per_token / config.num_experts if config.num_experts else 1.0

    def _link_bytes(self, rows: int, tokens: int) -> int:
        """A sum goes around a ring twice, all but one part of it (Patarasuk and Yuan, 2009)."""
        config, count = self.config, self.parts.count
        if count == 1:
            return 0
        is_cut = self.parts.of(config).vocab_size < config.vocab_size
        sums = 2 * config.num_layers + is_cut  # attention, MLP; and the embedding
        summed = 2 * sums * tokens * config.hidden_size
        gathered = rows * config.vocab_size if is_cut else 0
        return (summed + gathered) * _FLOAT32 * (count - 1) // count
