"""Reads one GGUF file: metadata as Python values, tensors dequantised to arrays.

The header is parsed here, with every count and offset checked against the file's size, because a
vocabulary of 260,000 strings must load in a fraction of a second and a lying file must be named,
not obeyed. Knows nothing of architectures.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from fastserve_jax.errors import ModelFileError

Metadata = dict[str, object]

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 2
_PIECE = 1 << 18  # values dequantised at a time
_NATIVE: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype(np.float64),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. `shape` is row-major: [out, in] for a linear weight."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int

    def rows(self, start: int, stop: int) -> TensorEntry:
        """Of them alone."""
        row_bytes = self.size_bytes // self.shape[0]
        shape, offset = (stop - start, *self.shape[1:]), self.offset_bytes + start * row_bytes
        return TensorEntry(self.type, shape, offset, (stop - start) * row_bytes)


class GgufFile:
    """One open file; tensors are read from a memory map when asked for.

    Raises ModelFileError for anything that is not a complete GGUF of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelFileError(f"{path}: cannot read: {error}") from error
        header = _Header(path, self._data)
        self.metadata = header.metadata
        self.tensors = header.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows: float16 and bfloat16 as stored, everything else as
        float32."""
        entry = self.tensors[name] if rows is None else self.tensors[name].rows(*rows)
        native = _NATIVE.get(entry.type)
        if native is not None:
            count = math.prod(entry.shape)
            array: NDArray[Any] = np.frombuffer(self._data, native, count, entry.offset_bytes)
            if entry.type is GGMLQuantizationType.F64:
                array = array.astype(np.float32)
            array = array.reshape(entry.shape)
            array = array if rows is None else np.array(array)
        else:
            try:
                array = self._dequantised(entry)
            except NotImplementedError as error:
                raise ModelFileError(
                    f"{self.path}: {name} is stored as {entry.type.name}, which cannot be read"
                ) from error
        if rows is not None:
            self._give_back(entry)
        return array

    def _give_back(self, entry: TensorEntry) -> None:
        """The file's pages that it lies in: while they are mapped, they count as ours."""
        first = -(-entry.offset_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.offset_bytes + entry.size_bytes - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED, first, length)

    def _dequantised(self, entry: TensorEntry) -> NDArray[np.float32]:
        """Piece by piece: the pieces' many temporaries then stay small and in cache."""
        block, block_bytes = GGML_QUANT_SIZES[entry.type]
        raw = np.frombuffer(self._data, np.uint8, entry.size_bytes, entry.offset_bytes)
        values = np.empty(math.prod(entry.shape), np.float32)
        step = _PIECE // block
        for first in range(0, len(raw) // block_bytes, step):
            piece = raw[first * block_bytes : (first + step) * block_bytes]
            floats = dequantize(piece.reshape(1, -1), entry.type)
            values[first * block : (first + step) * block] = floats[0]
        return values.reshape(entry.shape)


class _Header:
    """A cursor over the header; leaves `metadata` and `tensors` behind."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._at = path, data, len(data), 0
        if self._size < 24 or data[:4] != b"GGUF":
            raise ModelFileError(f"{path}: not a GGUF file")
        self._at = 4
        version = self._u32()
        if version not in _VERSIONS:
            kind = "big-endian or " if version & 0xFFFF == 0 else ""
            raise ModelFileError(f"{path}: {kind}unknown GGUF version {version}")
        tensor_count, field_count = self._u64(), self._u64()
        # A field takes at least 13 bytes and a tensor 24: larger counts cannot be true.
        if field_count * 13 + tensor_count * 24 > self._size:
            raise self._bad(f"claims {field_count} fields and {tensor_count} tensors")
        self.metadata: Metadata = {}
        for _ in range(field_count):
            key = self._string()
            if key in self.metadata:
                raise self._bad(f"field {key} occurs twice")
            self.metadata[key] = self._value(self._u32(), 0)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ModelFileError(f"{path}: one part of a split GGUF; merge its parts first")
        entries = [self._tensor() for _ in range(tensor_count)]
        self.tensors = self._placed(entries)

    def _bad(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: damaged GGUF: {why} at byte {self._at}")

    def _take(self, count: int) -> int:
        """Moves over `count` bytes and returns where they start."""
        start = self._at
        if count > self._size - start:
            raise self._bad(f"{count} bytes wanted, the file has {self._size} bytes in all")
        self._at = start + count
        return start

    def _u32(self) -> int:
        return int(_U32.unpack_from(self._data, self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack_from(self._data, self._take(8))[0])

    def _string(self) -> str:
        count = self._u64()
        start = self._take(count)
        return self._data[start : start + count].decode("utf-8", "replace")

    def _value(self, kind: int, depth: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        dtype = self._scalar(kind)
        start = self._take(dtype.itemsize)
        return np.frombuffer(self._data, dtype, 1, start).item()

    def _scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise self._bad(f"unknown value type {kind}")
        return _SCALARS[kind]

    def _array(self, depth: int) -> list[Any]:
        kind, count = self._u32(), self._u64()
        if depth > _MAX_ARRAY_DEPTH:
            raise self._bad("arrays nested too deep")
        if kind in (_STRING, _ARRAY):
            if count * 8 > self._size - self._at:
                raise self._bad(f"an array of {count} values")
            return [self._value(kind, depth) for _ in range(count)]
        dtype = self._scalar(kind)
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).tolist()

    def _tensor(self) -> tuple[str, TensorEntry]:
        name = self._string()
        dims = self._u32()
        if not 1 <= dims <= _MAX_DIMS:
            raise self._bad(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed([self._u64() for _ in range(dims)]))
        number, offset = self._u32(), self._u64()
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._bad(f"tensor {name} has unknown type {number}") from None
        if shape[-1] % block:
            raise self._bad(f"tensor {name}: rows of {shape[-1]} in blocks of {block}")
        return name, TensorEntry(kind, shape, offset, math.prod(shape) // block * block_bytes)

    def _placed(self, entries: list[tuple[str, TensorEntry]]) -> dict[str, TensorEntry]:
        """Offsets counted from the file's start, each tensor shown to lie inside the file."""
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise self._bad(f"alignment {align!r}")
        base = -(-self._at // align) * align
        placed: dict[str, TensorEntry] = {}
        for name, entry in entries:
            start = base + entry.offset_bytes
            if name in placed:
                raise self._bad(f"tensor {name} occurs twice")
            if start + entry.size_bytes > self._size:
                raise ModelFileError(
                    f"{self._path}: truncated: tensor {name} ends at byte "
                    f"{start + entry.size_bytes}, the file has {self._size}"
                )
            placed[name] = TensorEntry(entry.type, entry.shape, start, entry.size_bytes)
        return placed
