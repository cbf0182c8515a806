"""Small matrices beside large ones, trained in their stead (Hu et al., "LoRA", 2021, section 4.1).

A matrix W [out, in] becomes W + (alpha / rank) B A with A [rank, in] drawn and B [out, rank] zero,
so that training begins where the model stands. Names are the model's with .a and .b behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from fastserve_jax.errors import ConfigError

type Arrays = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lora:
    rank: int = 0  # 0: the whole model is trained
    alpha: float = 16.0
    targets: tuple[str, ...] = ("layers.*.attn.*", "layers.*.mlp.*")  # which matrices
    merge: bool = True  # into a model; false: an adapter remains, served beside its base

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank is at least 0, not {self.rank}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def of(self, name: str) -> bool:
        matrix = name.removesuffix(".weight")
        return matrix != name and any(fnmatchcase(matrix, target) for target in self.targets)


def adapters(arrays: Arrays, lora: Lora, seed: int) -> dict[str, jax.Array]:
    """For the matrices among `arrays` that are targets, and whole what says labels, which begins
    at nothing. Raises ConfigError where there is no target."""
    chosen = {name: array for name, array in arrays.items() if array.ndim == 2 and lora.of(name)}
    if not chosen:
        raise ConfigError(f"no matrix is named like {', '.join(lora.targets)}")
    # Copies: a step takes what is trained, and the base's own stays.
    made = {n: array.copy() for n, array in arrays.items() if n.startswith("classifier.")}
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    for key, (name, array) in zip(keys, sorted(chosen.items()), strict=True):
        out, size = array.shape
        bound = 1 / math.sqrt(size)
        made[f"{name}.a"] = jax.random.uniform(key, (lora.rank, size), minval=-bound, maxval=bound)
        made[f"{name}.b"] = jnp.zeros((out, lora.rank))
    return made


def halves(trained: Arrays) -> dict[str, tuple[Any, Any]]:
    """a and b by the name of the matrix that they are beside."""
    names = [name.removesuffix(".a") for name in trained if name.endswith(".a")]
    return {name: (trained[f"{name}.a"], trained[f"{name}.b"]) for name in names}


def merged(arrays: Arrays, trained: Arrays, lora: Lora) -> dict[str, jax.Array]:
    """The model that both together are."""

    def one(name: str, array: jax.Array) -> jax.Array:
        if f"{name}.a" not in trained:
            whole: jax.Array = trained.get(name, array)
            return whole
        change: jax.Array = trained[f"{name}.b"] @ trained[f"{name}.a"]
        return array + lora.scale * change

    return {name: one(name, array) for name, array in arrays.items()}
