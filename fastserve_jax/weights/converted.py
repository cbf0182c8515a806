"""Keeps a model's parameters as the device wants them, so that a second start converts nothing.

One safetensors file per model and dtype, in the cache; written whole or not at all. It is only
ever a copy: what cannot be read or written is done without.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .load import ModelFiles

MOST_BYTES = 4 << 30  # larger models are converted at every start: the copy would lie twice in RAM
_FORMAT = 1  # raise it when the meaning of a canonical name changes

type Parameter = tuple[str, NDArray[Any]]


def parameters_as(
    files: ModelFiles, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike, folder: Path
) -> Iterator[Parameter]:
    """Every parameter of `shapes` by name, in `dtype`. Raises what `ModelFiles.tensors` does."""
    kind = np.dtype(dtype)
    total_bytes = kind.itemsize * sum(int(np.prod(shape)) for shape in shapes.values())
    if files.path.is_dir() or total_bytes > MOST_BYTES:
        yield from _cast(files, shapes, kind)
        return
    path = folder / f"{files.name}-{_key(files.path, shapes, kind)}.safetensors"
    if path.exists():
        try:
            kept = list(_read(path, shapes, kind))
        except (OSError, SafetensorError, KeyError, ValueError):
            path.unlink(missing_ok=True)
        else:
            yield from kept
            return
    made: dict[str, NDArray[Any]] = {}
    for name, array in _cast(files, shapes, kind):
        made[name] = array
        yield name, array
    _write(path, made)


def _cast(
    files: ModelFiles, shapes: Mapping[str, tuple[int, ...]], kind: np.dtype[Any]
) -> Iterator[Parameter]:
    for name, array in files.tensors(shapes):
        yield name, np.ascontiguousarray(array, kind)


def _key(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: np.dtype[Any]) -> str:
    status = path.stat()
    facts = (_FORMAT, str(path), status.st_size, status.st_mtime_ns, kind.name, sorted(shapes))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _read(
    path: Path, shapes: Mapping[str, tuple[int, ...]], kind: np.dtype[Any]
) -> Iterator[Parameter]:
    with safe_open(path, framework="numpy") as file:
        for name, shape in shapes.items():
            array = file.get_tensor(name)
            if array.shape != shape or array.dtype != kind:
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            yield name, array


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            part = Path(folder) / "part"
            save_file(arrays, part)
            os.replace(part, path)
    except (OSError, SafetensorError):
        return  # a full or read-only disk costs time at the next start, nothing else
