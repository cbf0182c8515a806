"""A tokenizer from a Hugging Face folder: tokenizer.json, or a SentencePiece model beside it.

Byte-level BPE goes through `tokenizers`; for the rest tokenizer.model or spiece.model is preferred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer as Library

from fastserve_jax.errors import ModelFileError
from fastserve_jax.text import backend, sentencepiece_model
from fastserve_jax.text.byte_level import token_to_bytes
from fastserve_jax.text.endings import end_ids
from fastserve_jax.text.sentencepiece_model import parse_model, piece_to_bytes
from fastserve_jax.text.tokenizer import Tokenizer, Vocabulary

_MAX_FILE_BYTES = 256 << 20
_MAX_SENTINELS = 1000
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_PIECE = proto.ModelProto.SentencePiece


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that training did not make; special ones are never found in text."""

    id: int
    text: str
    special: bool


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Raises ModelFileError if the folder has no tokenizer or one of an unknown kind."""
    try:
        return _from_folder(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{folder}: malformed tokenizer files: {error!r}") from error


def _from_folder(folder: Path) -> Tokenizer:
    data = _json(folder / "tokenizer.json")
    settings = _Settings(folder, data)
    kind = data["model"].get("type") if data else None
    if kind == "BPE" and '"ByteLevel"' in json.dumps(data.get("decoder")):
        return _from_backend(settings, data, byte_level=True)
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return _from_sentencepiece(settings, _read(folder / name))
    if kind == "Unigram" or (kind == "BPE" and data["model"].get("byte_fallback")):
        return _from_backend(settings, data, byte_level=False)
    if data:
        raise ModelFileError(
            f"{folder}/tokenizer.json: BPE and Unigram are supported, this is {kind}"
        )
    raise ModelFileError(
        f"{folder}: neither tokenizer.json nor tokenizer.model nor spiece.model is there"
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelFileError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot read: {error.strerror}") from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return value


def _token_text(token: object) -> str:
    """A token is named by its text, or by an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(id for id in values if isinstance(id, int) and id >= 0)


class _Settings:
    """What the small JSON files of a folder say about its tokens."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self.config = _json(folder / "tokenizer_config.json")
        listed = list(data.get("added_tokens") or ())
        for id, token in (self.config.get("added_tokens_decoder") or {}).items():
            listed.append({**token, "id": int(id)})
        special_map = _json(folder / "special_tokens_map.json")
        self.named = {
            name: text
            for name in _NAMED
            if (text := _token_text(self.config.get(name) or special_map.get(name)))
        }
        ends = _ids(_json(folder / "generation_config.json").get("eos_token_id"))
        self.ends = ends or _ids(_json(folder / "config.json").get("eos_token_id"))
        # T5's, which stand for what is left out of a text: the last one first.
        extra = self.config.get("extra_ids")
        count = extra if isinstance(extra, int) and 0 <= extra <= _MAX_SENTINELS else 0
        self.sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
        self.has_encoder = _json(folder / "config.json").get("is_encoder_decoder") is True
        must = set(self.named.values())
        self.added: dict[int, _Added] = {}
        for token in listed:
            id, text = token.get("id"), token.get("content")
            if not isinstance(id, int) or not 0 <= id < 1 << 24 or not isinstance(text, str):
                raise ModelFileError(f"{folder}: an added token is {str(token)[:80]}")
            special = bool(token.get("special")) or text in must or id in self.ends
            self.added[id] = _Added(id, text, special)

    def vocabulary(
        self,
        pieces: list[bytes],
        control: set[int],
        ids: Mapping[str, int],
        begins_with: Callable[[int], bool],
        space_prefix: bool,
        prefix_after_control: bool,
    ) -> Vocabulary:
        """`ids` finds a token by text; `begins_with` tells what the file itself does with BOS."""
        bos = ids.get(self.named.get("bos_token", ""))
        eos = ids.get(self.named.get("eos_token", ""))
        control |= {id for id in (bos, eos) if id is not None}
        texts = {pieces[id].decode("utf-8", "replace"): id for id in control}
        add_bos = self.config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = bos is not None and begins_with(bos)
        return Vocabulary(
            pieces=tuple(pieces),
            control=frozenset(control),
            bos_id=bos,
            eos_ids=end_ids((eos, *self.ends), texts),
            add_bos=add_bos,
            space_prefix=space_prefix,
            prefix_after_control=prefix_after_control,
            chat_template=self._chat_template(),
            named=self.named,
            closing=((eos,) if eos is not None else self.ends[:1]) if self.has_encoder else (),
        )

    def _chat_template(self) -> str | None:
        if (self.folder / "chat_template.jinja").is_file():
            return _read(self.folder / "chat_template.jinja").decode("utf-8", "replace")
        template = self.config.get("chat_template")
        if isinstance(template, list):
            by_name = {entry.get("name"): entry.get("template") for entry in template}
            template = by_name.get("default")
        return template if isinstance(template, str) else None


def _from_sentencepiece(settings: _Settings, data: bytes) -> Tokenizer:
    model = parse_model(data)
    listed = {token.text for token in settings.added.values()}
    for text in settings.sentinels:  # behind the pieces of the file, where no list says otherwise
        if text not in listed:
            model.pieces.add(piece=text, score=0, type=_PIECE.CONTROL)
    for token in sorted(settings.added.values(), key=lambda token: token.id):
        kind = _PIECE.CONTROL if token.special else _PIECE.USER_DEFINED
        while len(model.pieces) < token.id:
            model.pieces.add(piece=f"<unused {len(model.pieces)}>", score=0, type=_PIECE.UNUSED)
        if len(model.pieces) == token.id:
            model.pieces.add(piece=token.text, score=0, type=kind)
        elif token.special and model.pieces[token.id].type != _PIECE.UNKNOWN:
            model.pieces[token.id].type = kind
    prefix = model.normalizer_spec.add_dummy_prefix
    hidden = (_PIECE.CONTROL, _PIECE.UNKNOWN)
    vocabulary = settings.vocabulary(
        pieces=[piece_to_bytes(piece.piece, piece.type == _PIECE.BYTE) for piece in model.pieces],
        control={id for id, piece in enumerate(model.pieces) if piece.type in hidden},
        ids={piece.piece: id for id, piece in enumerate(model.pieces)},
        begins_with=lambda bos: True,
        space_prefix=prefix,
        prefix_after_control=bool(settings.config.get("legacy", True)),
    )
    return Tokenizer(vocabulary, sentencepiece_model.build_encoder(model))


def _hide_special(data: dict[str, Any], added: Mapping[int, _Added]) -> None:
    """Unigram knows special tokens as pieces too, and would find them in text: not by a name with a
    space, which no text has when it is cut."""
    special = {token.id for token in added.values() if token.special}
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = [
        [f" {id}" if id in special else piece, score] for id, (piece, score) in enumerate(vocab)
    ]
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] not in special]


def _from_backend(settings: _Settings, data: dict[str, Any], byte_level: bool) -> Tokenizer:
    listed = data["model"]["vocab"]  # by Unigram, with scores
    vocab = listed if isinstance(listed, dict) else {p: id for id, (p, _) in enumerate(listed)}
    pieces = [b""] * (max([*vocab.values(), *settings.added]) + 1)
    for token, id in vocab.items():
        pieces[id] = token_to_bytes(token) if byte_level else piece_to_bytes(token, True)
    for added in settings.added.values():
        pieces[added.id] = added.text.encode("utf-8", "replace")
    data["added_tokens"] = [
        token | {"special": settings.added[token["id"]].special}
        for token in data.get("added_tokens") or ()
    ]
    if isinstance(listed, list):
        _hide_special(data, settings.added)
    data["truncation"] = data["padding"] = None
    prefix = backend.Prefix() if byte_level else backend.take_prefix(data)
    try:
        library = Library.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{settings.folder}/tokenizer.json: {error}") from error
    library.encode_special_tokens = True  # special tokens in text are text
    vocabulary = settings.vocabulary(
        pieces,
        control={token.id for token in settings.added.values() if token.special},
        ids=vocab | {token.text: token.id for token in settings.added.values()},
        begins_with=lambda bos: library.encode("a").ids[:1] == [bos],
        space_prefix=prefix.space,
        prefix_after_control=prefix.after_control,
    )
    return Tokenizer(vocabulary, backend.build_encoder(library, prefix))
