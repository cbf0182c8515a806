"""SentencePiece vocabularies: piece tables, and an encoder that knows where a text begins."""

from __future__ import annotations

import re
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto

from fastserve_jax.errors import ModelFileError
from fastserve_jax.text.tokenizer import Encode

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_to_bytes(piece: str, is_byte: bool) -> bytes:
    """What a piece stands for: a byte, or text in which U+2581 is a space."""
    if is_byte and (match := _BYTE.fullmatch(piece)):
        return bytes([int(match.group(1), 16)])
    return piece.replace(SPACE, " ").encode("utf-8", "replace")


def build_encoder(model: Any) -> Encode:
    """An encoder from a ModelProto, which is changed: the leading space is ours to add.

    So text that follows a control token can be encoded without one. Raises ModelFileError.
    """
    # With whitespace collapsed the library must add it itself, or it would be collapsed too.
    ours = model.normalizer_spec.add_dummy_prefix and (
        not model.normalizer_spec.remove_extra_whitespaces
    )
    if ours:
        model.normalizer_spec.add_dummy_prefix = False
    try:
        processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelFileError(f"the SentencePiece vocabulary cannot be used: {error}") from error

    def encode(text: str, at_start: bool) -> list[int]:
        text.encode()  # the library would read a lone surrogate as something else
        ids: list[int] = processor.encode(" " + text if ours and at_start else text)
        return ids

    return encode


def parse_model(data: bytes) -> Any:
    """A ModelProto from the bytes of a tokenizer.model. Raises ModelFileError."""
    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelFileError(f"not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise ModelFileError("not a SentencePiece model: it has no pieces")
    return model
