"""Reads the safetensors of a Hugging Face folder, one tensor at a time, whole or in shards.

Knows nothing of architectures: names go by the table it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fastserve_jax.errors import ModelFileError
from fastserve_jax.weights.names import Names

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder. Raises ModelFileError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return value


def _names(shard: Any) -> list[str]:
    return list(shard.keys())


class Folder:
    """The tensors of a folder, by the names of `names`.

    Checkpoints saved from the bare model lack the leading `model.` or `transformer.`; it is put
    back, so a table knows one spelling. Shards stay memory-mapped while this lives.
    """

    def __init__(self, path: Path, names: Names) -> None:
        self.path = path
        self._shards = {file: self._opened(file) for file in self._files()}
        prefix = names.parts["embed"][0].partition(".")[0] + "."
        stored = {name: file for file, shard in self._shards.items() for name in _names(shard)}
        bare = not any(name.startswith(prefix) for name in stored)
        self.tensors: dict[str, tuple[str, str]] = {}  # name: (file, stored name)
        for name, file in stored.items():
            known = prefix + name if bare and not name.startswith("lm_head.") else name
            self.tensors[known] = (file, name)

    def _files(self) -> list[str]:
        if (self.path / _INDEX).is_file():
            weight_map = read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFileError(f"{self.path / _INDEX}: no weight_map")
            files = sorted({str(file) for file in weight_map.values()})
            if any(Path(file).name != file for file in files):
                raise ModelFileError(f"{self.path / _INDEX}: a shard outside the folder")
            return files
        if not (self.path / _SINGLE).is_file():
            raise ModelFileError(f"{self.path}: neither {_SINGLE} nor {_INDEX} is there")
        return [_SINGLE]

    def _opened(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise ModelFileError(f"{self.path / file}: cannot read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self.tensors[name]
        return tuple(self._shards[file].get_slice(stored).get_shape())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows: float16 and bfloat16 as stored, everything else as
        float32."""
        file, stored = self.tensors[name]
        dtype = self._shards[file].get_slice(stored).get_dtype()
        if dtype not in _DTYPES:
            raise ModelFileError(f"{self.path / file}: {stored} is {dtype}, not a float type")
        if rows is None:
            array: NDArray[Any] = self._shards[file].get_tensor(stored)
        else:  # by a mapping of its own, which goes with it: pages that were read count as ours
            with self._opened(file) as shard:
                array = shard.get_slice(stored)[rows[0] : rows[1]]
        return array.astype(np.float32) if dtype == "F64" else array
