"""Rebuilds a tokenizer from a GGUF's tokenizer.* metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Library

from fastserve_jax.errors import ModelFileError
from fastserve_jax.text import backend, sentencepiece_model
from fastserve_jax.text.byte_level import (
    BOS_BY_DEFAULT,
    WHOLE_WORDS,
    token_to_bytes,
    word_cutter,
)
from fastserve_jax.text.endings import end_ids
from fastserve_jax.text.sentencepiece_model import SPACE, piece_to_bytes
from fastserve_jax.text.tokenizer import Encode, Tokenizer, Vocabulary

_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """Raises ModelFileError for a vocabulary of an unknown kind or with parts missing."""
    source = _Metadata(metadata)
    kind = source.get("model")
    try:
        if kind == "llama":
            return _sentencepiece(source)
        if kind == "gpt2":
            return _byte_level(source)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(f"malformed tokenizer metadata: {error!r}") from error
    raise ModelFileError(f"tokenizer model {kind!r} is not known; llama and gpt2 are")


class _Metadata:
    """The fields, their types checked; `types` are one per token."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields
        self.tokens: list[str] = self.list_of("tokens", str)
        self.types: list[int] = [_UNUSED if not token else 1 for token in self.tokens]
        if self.get("token_type") is not None:
            self.types = self.list_of("token_type", int)
        if len(self.types) != len(self.tokens):
            raise ModelFileError("tokenizer.ggml.token_type and tokens differ in length")

    def get(self, key: str) -> object:
        return self._fields.get(_PREFIX + key)

    def list_of(self, key: str, kind: type) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise ModelFileError(f"{_PREFIX}{key} is missing or not a list of {kind.__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def id(self, key: str, default: int | None = None) -> int | None:
        value = self.get(f"{key}_token_id")
        if value is None:
            value = default
        in_range = isinstance(value, int) and 0 <= value < len(self.tokens)
        return value if in_range and isinstance(value, int) else None

    def vocabulary(
        self, pieces: list[bytes], bos: int | None, eos: int | None, add_bos: bool, prefix: bool
    ) -> Vocabulary:
        control = {id for id, kind in enumerate(self.types) if kind in (_CONTROL, _UNKNOWN)}
        control |= {id for id in (bos, eos) if id is not None}
        ends = [eos, self.id("eot"), self.id("eom")]
        template = self._fields.get("tokenizer.chat_template")
        named = {f"{short}_token": self.id(long) for short, long in _NAMED.items()}
        return Vocabulary(
            pieces=tuple(pieces),
            control=frozenset(control),
            bos_id=bos,
            eos_ids=end_ids(ends, {self.tokens[id]: id for id in control}),
            add_bos=self.flag("add_bos_token", add_bos),
            space_prefix=prefix,
            prefix_after_control=True,
            chat_template=template if isinstance(template, str) else None,
            named={name: self.tokens[id] for name, id in named.items() if id is not None},
        )


def _sentencepiece(source: _Metadata) -> Tokenizer:
    bos, eos, unknown = source.id("bos", 1), source.id("eos", 2), source.id("unknown", 0)
    prefix = source.flag("add_space_prefix", True)
    pieces = [
        piece_to_bytes(token, kind == _BYTE)
        for token, kind in zip(source.tokens, source.types, strict=True)
    ]
    vocabulary = source.vocabulary(pieces, bos, eos, add_bos=True, prefix=prefix)
    return Tokenizer(
        vocabulary, sentencepiece_model.build_encoder(_model_proto(source, unknown, prefix))
    )


def _model_proto(source: _Metadata, unknown: int | None, prefix: bool) -> Any:
    """A BPE model over the file's pieces, its scores being the merge order."""
    scores = source.list_of("scores", float)
    if len(scores) != len(source.tokens):
        raise ModelFileError("tokenizer.ggml.scores and tokens differ in length")
    model = proto.ModelProto()
    seen: set[str] = set()
    for id, (token, score, kind) in enumerate(
        zip(source.tokens, scores, source.types, strict=True)
    ):
        if id == unknown:
            kind = _UNKNOWN
        elif kind == _UNKNOWN:
            kind = _CONTROL  # the library allows one unknown piece
        elif kind == _USER:
            token = token.replace(" ", SPACE)  # conversions write these with real spaces
        if not token or token in seen:
            token, kind = f"<duplicate {id}>", _UNUSED
        seen.add(token)
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(source.tokens)
    trainer.byte_fallback = _BYTE in source.types
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model


def _byte_level(source: _Metadata) -> Tokenizer:
    pre = source.get("pre") or "default"
    if not isinstance(pre, str):
        raise ModelFileError(f"{_PREFIX}pre is not text")
    pieces = [
        token.encode("utf-8", "replace") if kind in (_CONTROL, _USER) else token_to_bytes(token)
        for token, kind in zip(source.tokens, source.types, strict=True)
    ]
    bos, eos = source.id("bos"), source.id("eos")
    vocabulary = source.vocabulary(pieces, bos, eos, add_bos=pre in BOS_BY_DEFAULT, prefix=False)
    return Tokenizer(vocabulary, _byte_level_encoder(source, pre))


def _byte_level_encoder(source: _Metadata, pre: str) -> Encode:
    merges = [tuple(merge.split(" ", 1)) for merge in source.list_of("merges", str)]
    try:
        library = Library(
            models.BPE(
                vocab={token: id for id, token in enumerate(source.tokens)},
                merges=merges,
                ignore_merges=pre in WHOLE_WORDS,
            )
        )
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"the BPE vocabulary cannot be used: {error}") from error
    library.pre_tokenizer = word_cutter(pre)
    # Control tokens are left out, so no text matches them.
    library.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(source.tokens, source.types, strict=True)
            if kind == _USER
        ]
    )
    return backend.build_encoder(library, backend.Prefix())
