"""A decoder's matrices in fewer bits, layer by layer, each on what the ones before it make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.precision import INT4, INT8, KINDS, Stored
from fastserve_jax.weights.grids import rounded, widened

from .migrate import migrate
from .second_order import gptq
from .seen import Seen, Text, Walk

NEAREST, GPTQ, AWQ = METHODS = ("nearest", "gptq", "awq")
_LEAST_GROUP = 16  # of a matrix that has no longer stretches four bits are not enough

type Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Quantising:
    """`to` is of precision.KINDS; `group` inputs share a scale in four bits; `kept` matrices stay
    floats, where * stands for anything: "layers.*.mlp.down"."""

    to: str
    method: str = GPTQ
    group: int = 32
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.to not in KINDS:
            raise ConfigError(f"no type {self.to}: there are {', '.join(KINDS)}")
        if self.method not in METHODS:
            raise ConfigError(f"no method {self.method}: there are {', '.join(METHODS)}")
        if self.group < _LEAST_GROUP or self.group % 2:
            raise ConfigError(f"groups are even, of {_LEAST_GROUP} inputs or more: {self.group}")

    def of(self, matrix: str, size: int) -> Stored:
        """The vocabulary's matrix has eight bits at the least: rows are looked up in it, too."""
        if self.to != INT4:
            return Stored(self.to)
        group = gcd(self.group, size)
        fits = group >= _LEAST_GROUP and group % 2 == 0 and matrix.startswith("layers.")
        return Stored(INT4, group) if fits else Stored(INT8)


def quantise(
    config: ModelConfig,
    arrays: Mapping[str, NDArray[Any]],
    asked: Quantising,
    text: Text | None,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Stored]]:
    """Parameters as weights/orbax.py's write_model takes them, and how their matrices are stored.
    Experts' matrices stay floats. Raises ConfigError."""
    if asked.method != NEAREST and text is None:
        raise ConfigError(f"{asked.method} needs text to see what goes into the matrices")
    now = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    kinds = _kinds(asked, now)
    made: dict[str, NDArray[Any]] = {}

    def settle(matrix: str, seen: Seen | None) -> None:
        weight, of = now[f"{matrix}.weight"], kinds[matrix]
        matters = None if seen is None else np.diag(seen.gram)
        if seen is not None and asked.method == GPTQ:
            found = gptq(weight, seen.gram, of)
        else:
            found = rounded(weight, of, matters)
        made[f"{matrix}.weight"], made[f"{matrix}.scale"] = found
        now[f"{matrix}.weight"] = widened(*found, of).astype(np.float32)

    for matrix in ("embed", "head"):
        if matrix in kinds:
            settle(matrix, None)
    walk = None if asked.method == NEAREST or text is None else Walk(config, text)
    x = walk.begin(now) if walk else None
    for layer in range(config.num_layers):
        own = {n: of for n, of in kinds.items() if n.startswith(f"layers.{layer}.")}
        seen = walk.watch(layer, now, x) if walk and x is not None else {}
        if asked.method == AWQ:
            migrate(config, layer, now, seen, own)
        for matrix in own:
            settle(matrix, seen.get(matrix))
        x = walk.through(layer, now, x) if walk and x is not None else None
        progress(layer + 1, config.num_layers)
    return now | made, kinds


def _kinds(asked: Quantising, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Stored]:
    """Raises ConfigError where nothing comes of what was asked."""
    found, unknown = {}, {*asked.kept}
    for name, array in arrays.items():
        matrix = name.removesuffix(".weight")
        fixed = array.ndim != 2 or matrix == "positions" or matrix.endswith(".router")
        if matrix == name or fixed:
            continue
        keeping = {pattern for pattern in asked.kept if fnmatchcase(matrix, pattern)}
        unknown -= keeping
        if not keeping:
            found[matrix] = asked.of(matrix, array.shape[1])
    if unknown:
        raise ConfigError(f"nothing to keep is called {', '.join(sorted(unknown))}")
    if not found:
        raise ConfigError("every matrix is kept: nothing is left to quantise")
    if asked.to not in {of.kind for of in found.values()}:
        sizes = {
            array.shape[1] for n, array in arrays.items() if n.removesuffix(".weight") in found
        }
        raise ConfigError(
            f"no matrix has stretches of {_LEAST_GROUP} inputs or more in groups of {asked.group}: "
            f"take one that divides {', '.join(map(str, sorted(sizes)))}"
        )
    return found
