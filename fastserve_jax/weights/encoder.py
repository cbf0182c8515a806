"""Encoders out of Hugging Face's folders: BERT's names, and how its vectors are pooled."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.encoder import EncoderConfig
from fastserve_jax.weights.huggingface import Folder
from fastserve_jax.weights.names import Names
from fastserve_jax.weights.orbax import (
    CONFIG,
    ENCODER,
    Checkpoint,
    is_checkpoint,
    read_model_config,
)

_LAYER = "encoder.layer.{i}."
_PARTS = {
    "embed": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "segments": ("embeddings.token_type_embeddings",),
    "embed_norm": ("embeddings.LayerNorm",),
    "layers.{i}.qkv": tuple(f"{_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
    "layers.{i}.out": (f"{_LAYER}attention.output.dense",),
    "layers.{i}.attn_norm": (f"{_LAYER}attention.output.LayerNorm",),
    "layers.{i}.up": (f"{_LAYER}intermediate.dense",),
    "layers.{i}.down": (f"{_LAYER}output.dense",),
    "layers.{i}.mlp_norm": (f"{_LAYER}output.LayerNorm",),
}
BERT = Names(_PARTS, unused=("position_ids", "pooler.dense.weight", "pooler.dense.bias"))
_ARCHITECTURES = ("BertModel",)
_MEMBERS = (
    *("config.json", "modules.json", "1_Pooling/config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_MOST_BYTES = 8 << 30


def is_encoder(folder: Path) -> bool:
    """Or a decoder of ours that says labels: neither writes text."""
    if (folder / ENCODER).is_file() or _json(folder / CONFIG).get("labels"):
        return True
    listed = _json(folder / "config.json").get("architectures")
    return isinstance(listed, list) and any(name in _ARCHITECTURES for name in listed[:1])


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    name: str
    path: Path
    config: EncoderConfig | ModelConfig
    _source: Folder | Checkpoint = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Every parameter by name. Raises ModelFileError for one that is missing."""
        if isinstance(self._source, Checkpoint):
            for name in self._source.tensors:
                yield name, self._source.read(name).astype(np.float32)
            return
        for stem, stored in BERT.parts.items():
            endings = ("weight",) if stem in ("embed", "positions", "segments") else _BOTH
            layers = range(self.config.num_layers) if "{i}" in stem else (0,)
            for layer in layers:
                for ending in endings:
                    names = [f"{part.replace('{i}', str(layer))}.{ending}" for part in stored]
                    missing = [name for name in names if name not in self._source.tensors]
                    if missing:
                        raise ModelFileError(f"{self.path}: no tensor {', '.join(missing)}")
                    arrays = [np.asarray(self._source.read(n), np.float32) for n in names]
                    name = f"{stem.replace('{i}', str(layer))}.{ending}"
                    yield name, arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


_BOTH = ("weight", "bias")


def unpacked(archive: Path) -> Path:
    """The folder beside it with what it has of an encoder. Raises ModelFileError."""
    folder = archive.with_suffix("")
    if folder.is_dir():
        return folder
    try:
        with (
            zipfile.ZipFile(archive) as packed,
            tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as name,
        ):
            made = Path(name) / "made"
            for member in packed.infolist():
                if member.filename in _MEMBERS and member.file_size <= _MOST_BYTES:
                    packed.extract(member, made)
            os.replace(made, folder)
    except (OSError, zipfile.BadZipFile) as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise ModelFileError(f"{archive}: cannot unpack: {error}") from error
    return folder


def open_encoder(folder: Path, name: str) -> EncoderFiles:
    """Of Hugging Face's, or of our own. Raises ModelFileError."""
    if is_checkpoint(folder):
        return EncoderFiles(name, folder, read_model_config(folder)[0], Checkpoint(folder))
    own = folder / ENCODER
    if own.is_file():
        try:
            config = msgspec.json.decode(own.read_bytes(), type=EncoderConfig)
        except (OSError, msgspec.DecodeError) as error:
            raise ModelFileError(f"{own}: cannot read: {error}") from error
        return EncoderFiles(name, folder, config, Checkpoint(folder))
    values = _json(folder / "config.json")
    pooling = _json(folder / "1_Pooling" / "config.json")
    modules = (folder / "modules.json").read_text() if (folder / "modules.json").exists() else ""
    try:
        if values["hidden_act"] != "gelu":
            raise ModelFileError(
                f"{folder}: hidden_act = {values['hidden_act']!r} is not supported"
            )
        config = EncoderConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=int(values["hidden_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=int(values["num_attention_heads"]),
            intermediate_size=int(values["intermediate_size"]),
            max_context=int(values["max_position_embeddings"]),
            norm_eps=float(values["layer_norm_eps"]),
            segment_kinds=int(values["type_vocab_size"]),
            pooling="first" if pooling.get("pooling_mode_cls_token") else "mean",
            is_normed="Normalize" in modules,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder}/config.json: {error!r}") from error
    return EncoderFiles(name, folder, config, Folder(folder, BERT))


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    return value if isinstance(value, dict) else {}
