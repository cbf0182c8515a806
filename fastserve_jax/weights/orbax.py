"""Models of our own making: a folder with model.json, a tokenizer's files, and parameters that
Orbax keeps by their canonical names, read by rows.

    model.json         the ModelConfig, or encoder.json the EncoderConfig
    quantisation.json  how matrices are kept in fewer bits: {"layers.0.attn.qkv": {"kind": "int4",
                       "group": 64}}; without it all are floats
    params/            an Orbax checkpoint, a flat tree; such a matrix is bytes, with its .scale

Whoever trained or compressed a model writes it so; nothing needs to be renamed or turned.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.encoder import EncoderConfig
from fastserve_jax.models.precision import INT4, KINDS, W8A8, Stored
from fastserve_jax.weights.grids import packed, unpacked, widened
from fastserve_jax.weights.names import CANONICAL, Names

CONFIG, ENCODER, PARAMETERS = "model.json", "encoder.json", "params"
QUANTISED = "quantisation.json"
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


def read_stored(folder: Path) -> dict[str, Stored]:
    """By matrix. Raises ModelFileError."""
    path = folder / QUANTISED
    if not path.exists():
        return {}
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Stored])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    for name, stored in found.items():
        if stored.kind not in KINDS or stored.group < 0:
            raise ModelFileError(
                f"{path}: {name} is {stored.kind} by {stored.group}: this version knows "
                + ", ".join(KINDS)
            )
    return found


def write_model(
    folder: Path,
    config: ModelConfig | EncoderConfig,
    parameters: Mapping[str, Any],
    stored: Mapping[str, Stored] | None = None,
) -> None:
    """Arrays by canonical name, of the matrices in `stored` with their scales; the folder is there
    whole or not at all. Raises FileExistsError."""
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
        if stored:
            (made / QUANTISED).write_bytes(msgspec.json.format(msgspec.json.encode(stored)))
            for matrix, of in stored.items():
                tree[f"{matrix}.weight"] = packed(parameters[f"{matrix}.weight"], of)
                if of.kind != W8A8:  # scales of stretches are such numbers already
                    scale = parameters[f"{matrix}.scale"]
                    tree[f"{matrix}.scale"] = scale.astype(ml_dtypes.bfloat16)
        in_chunks = {key: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for key in tree}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((made / PARAMETERS).absolute(), tree, save_args=in_chunks)
        os.replace(made, folder)


@dataclass(slots=True)
class Checkpoint:
    """The tensors of a folder, each opened when it is first asked for. What is kept in fewer bits
    is read as floats, unless it is asked for as it is `stored`."""

    path: Path
    tensors: dict[str, tuple[int, ...]] = field(init=False)  # shapes
    stored: dict[str, Stored] = field(init=False)  # by matrix
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        import orbax.checkpoint as ocp

        try:
            # Its own choice asks what devices there are, which hosts must not before they have met.
            handler = ocp.PyTreeCheckpointHandler(enable_pinned_host_transfer=False)
            with ocp.Checkpointer(handler) as checkpointer:
                found = checkpointer.metadata((self.path / PARAMETERS).absolute())
            tree = dict(found.item_metadata.tree)
            self.tensors = {name: tuple(of.shape) for name, of in tree.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{self.path / PARAMETERS}: no checkpoint: {error}") from error
        self.stored = read_stored(self.path)
        for matrix, of in self.stored.items():
            shape = self.tensors.get(f"{matrix}.weight", ())
            if len(shape) != 2 or self.tensors.pop(f"{matrix}.scale", None) is None:
                raise ModelFileError(f"{self.path}: {matrix} has no weight and scale of {of.kind}")
            out, size = shape[0], shape[1] * (2 if of.kind == INT4 else 1)
            if of.group and size % of.group:
                raise ModelFileError(f"{self.path}: {size} inputs of {matrix} by {of.group}")
            self.tensors[f"{matrix}.weight"] = out, size

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[Any]:
        """The tensor, or some of its rows."""
        matrix = name.removesuffix(".weight")
        if matrix != name and matrix in self.stored:
            return widened(*self.read_stored(matrix, rows), self.stored[matrix])
        return self._read(name, rows)

    def read_stored(
        self, matrix: str, rows: tuple[int, int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Weight and scale of one that is kept in fewer bits, or of some of its rows."""
        of = self.stored[matrix]
        weight, scale = self._read(f"{matrix}.weight", rows), self._read(f"{matrix}.scale")
        chosen = slice(None) if rows is None else slice(*rows)
        out, size = self.tensors[f"{matrix}.weight"]
        if scale.shape != ((out,) if of.kind == W8A8 else (of.groups(size), out)):
            raise ModelFileError(f"{self.path}: {matrix}.scale is {scale.shape}")
        return unpacked(weight, of), scale[..., chosen].astype(np.float32)

    def _read(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[Any]:
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
        is_bytes = name.removesuffix(".weight") in self.stored and name.endswith(".weight")
        if tensor.dtype.name not in (("int8",) if is_bytes else _FLOATS):
            raise ModelFileError(f"{self.path}: {name} is {tensor.dtype.name}, not a float type")
        return tensor

    def _bad(self, name: str, error: Exception) -> ModelFileError:
        return ModelFileError(f"{self.path}: {name} cannot be read: {str(error)[:200]}")
