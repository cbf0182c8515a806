"""Models of our own making: a folder with model.json, a tokenizer's files, and parameters that
Orbax keeps by their canonical names, read by rows.

    model.json   the ModelConfig, or encoder.json the EncoderConfig
    params/      an Orbax checkpoint, a flat tree

Whoever trained or compressed a model writes it so; nothing needs to be renamed or turned.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.encoder import EncoderConfig
from fastserve_jax.weights.names import CANONICAL, Names

CONFIG, ENCODER, PARAMETERS = "model.json", "encoder.json", "params"
_CHUNK_BYTES = 16 << 20  # what is read for any row of it
_FLOATS = ("float32", "float16", "bfloat16")


def is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_model_config(folder: Path) -> tuple[ModelConfig, Names]:
    """Raises ModelFileError."""
    path = folder / CONFIG
    try:
        config = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    return config, CANONICAL


def write_model(
    folder: Path, config: ModelConfig | EncoderConfig, parameters: Mapping[str, Any]
) -> None:
    """Arrays by canonical name; the folder is there whole or not at all. Raises FileExistsError."""
    import orbax.checkpoint as ocp

    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as writing:
        made = Path(writing) / folder.name
        made.mkdir()
        name = CONFIG if isinstance(config, ModelConfig) else ENCODER
        (made / name).write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        tree = dict(parameters)
        in_chunks = {key: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for key in tree}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((made / PARAMETERS).absolute(), tree, save_args=in_chunks)
        os.replace(made, folder)


@dataclass(slots=True)
class Checkpoint:
    """The tensors of a folder, each opened when it is first asked for."""

    path: Path
    tensors: dict[str, tuple[int, ...]] = field(init=False)  # shapes
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        import orbax.checkpoint as ocp

        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.metadata((self.path / PARAMETERS).absolute())
            tree = dict(found.item_metadata.tree)
            self.tensors = {name: tuple(of.shape) for name, of in tree.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{self.path / PARAMETERS}: no checkpoint: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows, as it is stored."""
        if name not in self._opened:
            self._opened[name] = self._open(name)
        tensor = self._opened[name]
        chosen = tensor if rows is None else tensor[rows[0] : rows[1]]
        try:
            return np.asarray(chosen.read().result())
        except ValueError as error:
            raise self._bad(name, error) from error

    def _open(self, name: str) -> Any:
        import tensorstore

        base = f"file://{(self.path / PARAMETERS).absolute()}"
        kept = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        try:
            tensor = tensorstore.open({"driver": "zarr", "kvstore": kept}).result()
        except ValueError as error:
            raise self._bad(name, error) from error
        if tensor.dtype.name not in _FLOATS:
            raise ModelFileError(f"{self.path}: {name} is {tensor.dtype.name}, not a float type")
        return tensor

    def _bad(self, name: str, error: Exception) -> ModelFileError:
        return ModelFileError(f"{self.path}: {name} cannot be read: {str(error)[:200]}")
