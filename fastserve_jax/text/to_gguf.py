"""A folder's vocabulary as a GGUF keeps it: its tokenizer.* metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from sentencepiece import sentencepiece_model_pb2 as proto

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.text.load import VOCABULARY

_NORMAL, _CONTROL, _USER = 1, 3, 4  # tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."


def gguf_vocabulary(folder: Path) -> dict[str, Any]:
    """Raises ModelFileError, and ConfigError for a kind that a GGUF does not know."""
    try:
        if (folder / VOCABULARY).is_file():
            return msgspec.msgpack.decode((folder / VOCABULARY).read_bytes(), type=dict[str, Any])
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        if (folder / "tokenizer.model").is_file():
            return _sentencepiece((folder / "tokenizer.model").read_bytes(), settings)
        return _byte_level(json.loads((folder / "tokenizer.json").read_text()), settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{folder}: malformed tokenizer files: {error!r}") from error


def _sentencepiece(data: bytes, settings: dict[str, Any]) -> dict[str, Any]:
    model = proto.ModelProto()
    model.ParseFromString(data)
    return {
        f"{_PREFIX}model": "llama",
        f"{_PREFIX}pre": "default",
        f"{_PREFIX}tokens": [piece.piece for piece in model.pieces],
        f"{_PREFIX}scores": [float(piece.score) for piece in model.pieces],
        f"{_PREFIX}token_type": [int(piece.type) for piece in model.pieces],
        f"{_PREFIX}bos_token_id": model.trainer_spec.bos_id,
        f"{_PREFIX}eos_token_id": model.trainer_spec.eos_id,
        f"{_PREFIX}unknown_token_id": model.trainer_spec.unk_id,
        f"{_PREFIX}add_bos_token": bool(settings.get("add_bos_token", True)),
        f"{_PREFIX}add_space_prefix": bool(model.normalizer_spec.add_dummy_prefix),
    }


def _byte_level(data: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    cutter = data.get("pre_tokenizer") or {}
    if data["model"]["type"] != "BPE" or cutter.get("type") != "ByteLevel":
        raise ConfigError("a GGUF has no name for how this vocabulary cuts text into words")
    added = {token["id"]: token for token in data.get("added_tokens", [])}
    ids = {id: token for token, id in data["model"]["vocab"].items()}
    ids |= {id: token["content"] for id, token in added.items()}
    tokens = [ids[id] for id in range(len(ids))]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    types = [_type(added.get(id)) for id in range(len(tokens))]
    found: dict[str, Any] = {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": "gpt-2",
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": types,
        f"{_PREFIX}merges": merges,
        f"{_PREFIX}add_bos_token": bool(settings.get("add_bos_token", False)),
    }
    for name in ("bos", "eos"):
        text = settings.get(f"{name}_token")
        if text in tokens:
            found[f"{_PREFIX}{name}_token_id"] = tokens.index(text)
    if isinstance(settings.get("chat_template"), str):
        found["tokenizer.chat_template"] = settings["chat_template"]
    return found


def _type(added: dict[str, Any] | None) -> int:
    if added is None:
        return _NORMAL
    return _CONTROL if added.get("special") else _USER
