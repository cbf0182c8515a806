"""Makes a tokenizer from what a model's files offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fastserve_jax.errors import ModelFileError
from fastserve_jax.text.folder_vocabulary import tokenizer_from_folder
from fastserve_jax.text.gguf_vocabulary import tokenizer_from_gguf
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.text.wordpiece import WordPiece, is_wordpiece, load_wordpiece

VOCABULARY = "vocabulary.msgpack"  # the tokenizer.* metadata of a GGUF, in a folder of our own


def load_tokenizer(source: Path | Mapping[str, object]) -> Tokenizer:
    """From a folder of Hugging Face's or of our own, or the tokenizer.* metadata of a GGUF. Raises
    ModelFileError."""
    if isinstance(source, Path) and (source / VOCABULARY).is_file():
        return tokenizer_from_gguf(_metadata(source / VOCABULARY))
    if isinstance(source, Path):
        return tokenizer_from_folder(source)
    return tokenizer_from_gguf(source)


def _metadata(path: Path) -> Mapping[str, object]:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Alone:
    """A decoder's tokenizer where an encoder's is asked for: it knows one text at a time."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode_pair(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]:
        assert pair is None, "two texts are an encoder's"
        ids = self.tokenizer.encode(text)
        return ids, [0] * len(ids)


type Reader = WordPiece | _Alone


def load_reader(folder: Path) -> Reader:
    """How a folder's model reads the texts that it says labels of."""
    return load_wordpiece(folder) if is_wordpiece(folder) else _Alone(load_tokenizer(folder))


def load_words(folder: Path) -> Callable[[Sequence[int]], str]:
    """How a folder's tokens read, whatever kind they are of."""
    if is_wordpiece(folder):
        library = load_wordpiece(folder).library
        return lambda ids: str(library.decode(list(ids)))
    return load_tokenizer(folder).decode
