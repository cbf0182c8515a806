"""Pruning while training goes on: more and more of each matrix becomes zero, and zeros stay.

The zeros are their own mask: nothing is kept beside the parameters, so a run that was cut off goes
on to the bit, and a model that was pruned before is trained on with what it has left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastserve_jax.errors import ConfigError

type Arrays = Mapping[str, jax.Array]

_PENALTY = 1e3  # nats; more than any loss


@dataclass(frozen=True, slots=True)
class Prune:
    keep: bool = False  # what is zero in the base stays so
    share: float = 0.0  # of each matrix that is zero in the end; 0: none becomes so
    begin: int = 0  # step of the first ones
    end: int = 0  # step of the last ones; 0: three quarters of the steps
    every: int = 10  # steps from some to more
    targets: tuple[str, ...] = ("layers.*.attn.*", "layers.*.mlp.*")  # which matrices

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"prune.share is from 0 to less than 1, not {self.share}")
        if self.every < 1 or self.begin < 0 or self.end < 0:
            raise ConfigError("prune.every is at least 1, prune.begin and prune.end at least 0")

    def check(self, steps: int) -> None:
        """Raises ConfigError."""
        if self.share and not self.begin < self.last(steps) <= steps:
            raise ConfigError(
                f"prune: from step {self.begin} to {self.last(steps)} of {steps} there are none"
            )

    def last(self, steps: int) -> int:
        return self.end or max(1, steps * 3 // 4)

    def of(self, name: str, array: jax.Array) -> bool:
        matrix = name.removesuffix(".weight")
        is_matrix = matrix != name and array.ndim == 2
        return is_matrix and any(fnmatchcase(matrix, target) for target in self.targets)

    def unfinished(self, step: int, steps: int) -> float:
        """Added to a loss, so that a model with less of it pruned is no better than one with more:
        the best is sought among those that are as sparse as was asked."""
        return _PENALTY * max(0, self.last(steps) - step) if self.share else 0.0


class Count(NamedTuple):
    step: jax.Array


def pruned(
    optimiser: optax.GradientTransformation, prune: Prune, steps: int
) -> optax.GradientTransformation:
    """`optimiser`, and then zeros. At step t from b to e the smallest numbers of each matrix are,
    a share of s (1 - (1 - (t - b) / (e - b))^3) (Zhu & Gupta, "To prune, or not to prune", 2017,
    section 3)."""
    if not (prune.keep or prune.share):
        return optimiser
    begin, end = prune.begin, prune.last(steps)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(updates, Mapping)
        assert isinstance(params, Mapping)
        assert isinstance(state, Count)
        step = state.step + 1
        way = jnp.clip((step - begin) / (end - begin), 0, 1)
        share = prune.share * (1 - (1 - way) ** 3)
        is_due = (step >= begin) & (step <= end) & ((step % prune.every == 0) | (step == end))

        def one(name: str, update: jax.Array) -> jax.Array:
            array = params[name]
            if not prune.of(name, array):
                return update
            gone = array == 0
            if prune.share:
                gone |= jax.lax.cond(
                    is_due,
                    lambda: _smallest(array + jnp.where(gone, -array, update), share),
                    lambda: gone,
                )
            return jnp.where(gone, -array, update)  # adds up to zero

        return {name: one(name, of) for name, of in updates.items()}, Count(step)

    zeros = optax.GradientTransformation(lambda _: Count(jnp.int32(0)), update)
    return optax.chain(optimiser, zeros)


def _smallest(array: jax.Array, share: jax.Array) -> jax.Array:
    size = jnp.abs(array)
    count = jnp.round(share * size.size).astype(jnp.int32)
    return size < jnp.sort(size.reshape(-1))[jnp.minimum(count, size.size - 1)]
