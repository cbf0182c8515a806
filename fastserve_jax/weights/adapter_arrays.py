"""An adapter's tensors, in PEFT's format, to the shapes that the decoder has room for.

What is missing, left over, of another shape or no number is refused, and named. Knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.models.adapters import Pair, Pairs, matrices
from fastserve_jax.models.config import ModelConfig

from .adapter import (
    PREFIX,
    TENSORS,
    AdapterFacts,
    Array,
    Halves,
    known_targets,
    read_facts,
    stems_of,
)

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_adapter(
    folder: Path, config: ModelConfig, rank: int | None, dtype: DTypeLike
) -> list[Pairs]:
    """As models/adapters.py has one set, of that rank, or the highest that it has, in numpy. Raises
    ModelFileError, and ConfigError where its own rank is higher."""
    facts, path = read_facts(folder), folder / TENSORS
    try:
        with safe_open(path, framework="numpy") as file:
            if rank is None:
                names = file.keys()
                rank = max((_rank(file, name) for name in names), default=0)
            return _Reader(path, file, facts, config, rank, dtype).layers()
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error


def _rank(file: Any, name: str) -> int:
    """Of a matrix's first half; of what is none nothing."""
    shape = file.get_slice(name).get_shape() if ".lora_A." in name else ()
    return int(shape[0]) if shape else 0


def merged(folder: Path, config: ModelConfig, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A model's arrays by the decoder's names, in float32, with what the adapter adds. Raises as
    `read_adapter` does."""
    made = dict(arrays)
    layers = read_adapter(folder, config, None, np.float32)
    for layer, pairs in enumerate(layers):
        for name, (a, b) in pairs.items():
            change = np.concatenate([own_b @ own_a for own_a, own_b in zip(a, b, strict=True)])
            made[f"layers.{layer}.{name}.weight"] = made[f"layers.{layer}.{name}.weight"] + change
    return made


class _Reader:
    def __init__(
        self,
        path: Path,
        file: Any,
        facts: AdapterFacts,
        config: ModelConfig,
        rank: int,
        dtype: DTypeLike,
    ) -> None:
        self.path, self.facts, self.config = path, facts, config
        self.rank, self.dtype = rank, np.dtype(dtype)
        self._file, self._left = file, set(file.keys())

    def layers(self) -> list[Pairs]:
        made = [
            {name: self._pair(layer, name) for name in matrices(self.config)}
            for layer in range(self.config.num_layers)
        ]
        if self._left:
            spare = ", ".join(sorted(self._left)[:4])
            known = ", ".join(dict.fromkeys(known_targets(self.config, 0)))
            raise ModelFileError(
                f"{self.path}: {spare} is beside no matrix that may have it, of layers 0 to "
                f"{self.config.num_layers - 1}: {known}"
            )
        return made

    def _pair(self, layer: int, name: str) -> Pair:
        size, outs = matrices(self.config)[name]
        stems = stems_of(self.config, layer, name)
        if len(stems) == len(outs):
            halves = [
                self._halves(stem, layer, size, out) for stem, out in zip(stems, outs, strict=True)
            ]
        else:  # stored as one
            a, b = self._halves(stems[0], layer, size, sum(outs))
            halves = [(a, part) for part in np.split(b, np.cumsum(outs)[:-1])]
        stacked: Array = np.stack([a for a, _ in halves])
        return Pair(stacked, tuple(b for _, b in halves))

    def _halves(self, stem: str, layer: int, size: int, out: int) -> Halves:
        """Filled up to the rank with zeros, which add nothing."""
        names = [f"{PREFIX}{stem}.lora_{half}.weight" for half in "AB"]
        a, b = np.zeros((self.rank, size), self.dtype), np.zeros((out, self.rank), self.dtype)
        there = [name for name in names if name in self._left]
        if len(there) < 2:
            if there or self._is_target(stem, layer):
                missing = ", ".join(sorted({*names} - {*there}))
                raise ModelFileError(f"{self.path}: {missing} is missing")
            return a, b
        shapes = [tuple(self._file.get_slice(name).get_shape()) for name in names]
        own = shapes[0][0] if shapes[0] else 0
        if shapes != [(own, size), (out, own)] or not own:
            raise ModelFileError(
                f"{self.path}: {stem} has {shapes[0]} and {shapes[1]}, expected "
                f"({self.facts.r}, {size}) and ({out}, {self.facts.r})"
            )
        if own > self.rank:
            raise ConfigError(
                f"{self.path}: rank {own}, and there is room for {self.rank}: start the server "
                f"with --set lora.max_rank={own}"
            )
        self._left -= {*names}
        a[:own] = self._read(names[0], 1.0)
        b[:, :own] = self._read(names[1], self.facts.scale(own))
        return a, b

    def _is_target(self, stem: str, layer: int) -> bool:
        """Whether PEFT would have trained it, as far as plain names say."""
        targets, layers = self.facts.target_modules, self.facts.layers_to_transform
        without = self.facts.exclude_modules or []
        if not isinstance(targets, list) or not isinstance(without, list):
            return False
        if layer not in ([layers] if isinstance(layers, int) else layers or [layer]):
            return False

        def is_among(names: list[str]) -> bool:
            return any(f".{stem}".endswith(f".{name}") for name in names)

        return is_among(targets) and not is_among(without)

    def _read(self, name: str, scale: float) -> Array:
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _FLOATS:
            raise ModelFileError(f"{self.path}: {name} is {kind}, not a float type")
        with np.errstate(over="ignore"):
            array: Array = (self._file.get_tensor(name).astype(np.float32) * scale).astype(
                self.dtype
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise ModelFileError(f"{self.path}: {name} has numbers that are not finite")
        return array
