"""Keeps a model's parameters as the device wants them, so that a second start converts nothing.

One safetensors file per model and precision, in the cache; written as parameters come, so that none
lies in memory twice, and there whole or not at all. It is only ever a copy: what cannot be read or
written is done without.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from fastserve_jax.models.precision import W8A8

from .load import ModelFiles
from .quantise import to_int8

MOST_BYTES = 16 << 30  # of a larger model the cache keeps no copy
KEPT = 3  # files of one model
_KEY_LENGTH = 24
_KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
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
    if files.path.is_dir() or sum(map(_size, wanted.values())) > MOST_BYTES:
        yield from _cast(files, wanted)
        return
    path = folder / _file_name(files.name, _key(files.path, wanted))
    if (kept := _open(path, wanted)) is not None:
        with kept:
            for name in wanted:
                yield name, kept.get_tensor(name)
        return
    with _Copy(path, wanted) as copy:
        for name, array in _cast(files, wanted):
            yield name, array
            copy.write(name, array)
        copy.keep()
    _prune(folder, files.name)


def _size(w: Wanted) -> int:
    """In bytes."""
    return int(np.prod(w.shape)) * np.dtype(w.dtype).itemsize


def _cast(files: ModelFiles, wanted: Parameters) -> Iterator[Parameter]:
    """The largest first: what of it is made on the way is gone before the others are there."""
    stored = {name: w.shape for name, w in wanted.items() if not name.endswith(".scale")}
    stored = dict(sorted(stored.items(), key=lambda item: -int(np.prod(item[1]))))
    as_they_are = [name for name in stored if _is_as_stored(files, name, wanted)]
    for name in as_they_are:
        matrix = name.removesuffix(".weight")
        weight, scale = files.as_stored(matrix)
        yield f"{matrix}.scale", scale
        yield name, weight
    for name, array in files.tensors(stored, as_they_are):
        kind = np.dtype(wanted[name].dtype)
        if kind == np.int8:
            array, scale = to_int8(array)
            yield f"{name.removesuffix('.weight')}.scale", scale
        yield name, np.ascontiguousarray(array, kind)


def _is_as_stored(files: ModelFiles, name: str, wanted: Parameters) -> bool:
    matrix = name.removesuffix(".weight")
    of, scale = files.stored.get(matrix), wanted.get(f"{matrix}.scale")
    if of is None or scale is None or np.dtype(wanted[name].dtype) != np.dtype(of.dtype):
        return False
    return len(scale.shape) == (1 if of.kind == W8A8 else 2)


def _key(path: Path, wanted: Parameters) -> str:
    status = path.stat()
    kinds = sorted((name, np.dtype(w.dtype).name) for name, w in wanted.items())
    facts = (_FORMAT, str(path), status.st_size, status.st_mtime_ns, kinds)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:_KEY_LENGTH]


def _open(path: Path, wanted: Parameters) -> Any:
    """The copy, if it is there and holds what is wanted; one that does not is removed."""
    try:
        file: Any = safe_open(path, framework="numpy")  # checks that nothing is cut off
        for name, w in wanted.items():
            part = file.get_slice(name)
            found, sought = (part.get_dtype(), part.get_shape()), (_kind(w), list(w.shape))
            if found != sought:
                raise ValueError(f"{name} is {found}")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError):
        path.unlink(missing_ok=True)
        return None
    return file


def _kind(w: Wanted) -> str:
    return _KINDS[np.dtype(w.dtype).name]


def _file_name(model: str, key: str) -> str:
    return f"{model}-{key}.safetensors"


def _prune(folder: Path, model: str) -> None:
    """Leaves the newest KEPT of a model's: each precision and each version of a file makes one."""
    made = folder.glob(_file_name(glob.escape(model), "?" * _KEY_LENGTH))
    for old in sorted(made, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        old.unlink(missing_ok=True)


class _Copy:
    """A copy being written, each parameter at its place; gone on leaving unless `keep` was called.
    A full or read-only disk costs time at the next start, nothing else."""

    def __init__(self, path: Path, wanted: Parameters) -> None:
        self._path = path
        self._begins: dict[str, int] = {}
        header, end = {}, 0
        for name, w in wanted.items():
            self._begins[name], end = end, end + _size(w)
            at = [self._begins[name], end]
            header[name] = {"dtype": _kind(w), "shape": list(w.shape), "data_offsets": at}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._part: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            parent = self._path.parent
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=parent, prefix=".writing-")
            self._part = open(Path(self._folder.name) / "part", "wb")
            self._part.write(self._header)
        except OSError:
            self._give_up()
        return self

    def write(self, name: str, array: NDArray[Any]) -> None:
        if self._part is not None:
            try:
                self._part.seek(len(self._header) + self._begins[name])
                self._part.write(array.reshape(-1).view(np.uint8).data)
            except OSError:
                self._give_up()

    def keep(self) -> None:
        if self._part is not None:
            try:
                self._part.close()
                os.replace(self._part.name, self._path)
            except OSError:
                self._give_up()

    def _give_up(self) -> None:
        if self._part is not None:
            self._part.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._part = self._folder = None

    def __exit__(self, *_: object) -> None:
        self._give_up()
