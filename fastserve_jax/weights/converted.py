"""Keeps a model's parameters as the device wants them, so that a second start converts nothing.

One safetensors file per model and precision, in the cache; written whole or not at all. It is only
ever a copy: what cannot be read or written is done without.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .load import ModelFiles
from .quantise import to_int8

MOST_BYTES = 4 << 30  # larger models are converted at every start: the copy would lie twice in RAM
KEPT = 3  # files of one model
_KEY_LENGTH = 24
_FORMAT = 3  # raise it when the meaning of a canonical name or of a scale changes


class Wanted(Protocol):
    """What a parameter must be; an int8 `x.weight` has its `x.scale` beside it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DTypeLike: ...


type Parameter = tuple[str, NDArray[Any]]
type Parameters = Mapping[str, Wanted]


def parameters_as(files: ModelFiles, wanted: Parameters, folder: Path) -> Iterator[Parameter]:
    """Every parameter of `wanted` by name. Raises what `ModelFiles.tensors` does."""
    total_bytes = sum(int(np.prod(w.shape)) * np.dtype(w.dtype).itemsize for w in wanted.values())
    if files.path.is_dir() or total_bytes > MOST_BYTES:
        yield from _cast(files, wanted)
        return
    path = folder / _file_name(files.name, _key(files.path, wanted))
    if path.exists():
        try:
            kept = list(_read(path, wanted))
        except (OSError, SafetensorError, KeyError, ValueError):
            path.unlink(missing_ok=True)
        else:
            yield from kept
            return
    made: dict[str, NDArray[Any]] = {}
    for name, array in _cast(files, wanted):
        made[name] = array
        yield name, array
    _write(path, made)
    _prune(folder, files.name)


def _cast(files: ModelFiles, wanted: Parameters) -> Iterator[Parameter]:
    stored = {name: w.shape for name, w in wanted.items() if not name.endswith(".scale")}
    for name, array in files.tensors(stored):
        kind = np.dtype(wanted[name].dtype)
        if kind == np.int8:
            array, scale = to_int8(array)
            yield f"{name.removesuffix('.weight')}.scale", scale
        yield name, np.ascontiguousarray(array, kind)


def _key(path: Path, wanted: Parameters) -> str:
    status = path.stat()
    kinds = sorted((name, np.dtype(w.dtype).name) for name, w in wanted.items())
    facts = (_FORMAT, str(path), status.st_size, status.st_mtime_ns, kinds)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:_KEY_LENGTH]


def _read(path: Path, wanted: Parameters) -> Iterator[Parameter]:
    with safe_open(path, framework="numpy") as file:
        for name, w in wanted.items():
            array = file.get_tensor(name)
            if array.shape != tuple(w.shape) or array.dtype != np.dtype(w.dtype):
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            yield name, array


def _file_name(model: str, key: str) -> str:
    return f"{model}-{key}.safetensors"


def _prune(folder: Path, model: str) -> None:
    """Leaves the newest KEPT of a model's: each precision and each version of a file makes one."""
    made = folder.glob(_file_name(glob.escape(model), "?" * _KEY_LENGTH))
    for old in sorted(made, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        old.unlink(missing_ok=True)


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            part = Path(folder) / "part"
            save_file(arrays, part)
            os.replace(part, path)
    except (OSError, SafetensorError):
        return  # a full or read-only disk costs time at the next start, nothing else
