"""A model's parameters as its parts have them, never the model as a whole.

Stored tensors are read by blocks of rows, and of each block goes where it belongs what a part of
this process has. Only where a file has rows in another order (Llama's q and k in GGUF, GPT-2's from
Hugging Face) a tensor is read whole, one at a time. Knows stored tensors and ranges, no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastserve_jax.models.parts import Ranges

from .load import ModelFiles
from .quantise import to_int8

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """What one part has of a parameter: along each axis these ranges, behind each other, or all."""

    axes: tuple[Ranges | None, ...]

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        runs = zip(self.axes, shape, strict=True)
        return tuple(size if run is None else sum(b - a for a, b in run) for run, size in runs)

    def take(self, piece: NDArray[Any], block: NDArray[Any], row: int) -> None:
        """Into `piece` what it has of the rows of the whole from `row` on."""
        for axis, ranges in enumerate(self.axes[1:], 1):
            if ranges is not None:
                runs = [block[(slice(None),) * axis + (slice(*run),)] for run in ranges]
                block = runs[0] if len(runs) == 1 else np.concatenate(runs, axis)
        at = 0
        for start, stop in self.axes[0] or ((0, row + len(block)),):
            low, high = max(start, row), min(stop, row + len(block))
            if low < high:
                piece[at + low - start : at + high - start] = block[low - row : high - row]
            at += stop - start

    def wants(self, row: int, count: int) -> bool:
        rows = self.axes[0]
        return rows is None or any(a < row + count and row < b for a, b in rows)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of the whole model, and what each part here has of it; without cuts it is all alike."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    cuts: tuple[Cut, ...] = ()


def pieces(
    files: ModelFiles, wanted: Mapping[str, Parameter]
) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    """Every parameter by name, for each of its cuts a piece. An int8 `x.weight` brings `x.scale`.

    Raises what `ModelFiles.tensors` does.
    """
    files.check_complete(name for name in wanted if not name.endswith(".scale"))
    for name, parameter in wanted.items():
        if name.endswith(".scale"):
            continue
        is_int8 = np.dtype(parameter.dtype) == np.int8
        made = _read(files, name, parameter, np.float32 if is_int8 else parameter.dtype)
        if not is_int8:
            yield name, made
            continue
        both = [to_int8(piece) for piece in made]
        yield name, [weight for weight, _ in both]
        yield f"{name.removesuffix('.weight')}.scale", [scale for _, scale in both]


def _read(
    files: ModelFiles, name: str, parameter: Parameter, dtype: DTypeLike
) -> list[NDArray[Any]]:
    cuts = parameter.cuts or (Cut((None,) * len(parameter.shape)),)
    made = [np.empty(cut.of(parameter.shape), dtype) for cut in cuts]
    for row, block in files.blocks(name, parameter.shape, _BLOCK_BYTES, _wanted_by(cuts)):
        for cut, piece in zip(cuts, made, strict=True):
            cut.take(piece, block, row)
    return made


def _wanted_by(cuts: Sequence[Cut]) -> Any:
    return lambda row, count: any(cut.wants(row, count) for cut in cuts)
