"""Texts as an encoder reads them: WordPiece, one text or two, between the marks it knows.

There is no way back: an encoder writes nothing. Knows no files but tokenizer.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Library

from fastserve_jax.errors import InvalidRequest, ModelFileError


@dataclass(frozen=True, slots=True)
class WordPiece:
    """Safe to use from several threads."""

    library: Library
    vocab_size: int

    def encode(self, text: str, pair: str | None = None) -> list[int]:
        """Token ids, marks included. Raises InvalidRequest for text that is not Unicode."""
        return self.encode_pair(text, pair)[0]

    def encode_pair(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids, and of each which text it is of."""
        try:
            found = self.library.encode(text, pair)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(f"text is not valid Unicode: {error}") from error
        return found.ids, found.type_ids


def is_wordpiece(folder: Path) -> bool:
    try:
        data = json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    model = data.get("model") if isinstance(data, dict) else None
    return isinstance(model, dict) and model.get("type") == "WordPiece"


def load_wordpiece(folder: Path) -> WordPiece:
    """Raises ModelFileError."""
    path = folder / "tokenizer.json"
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library knows no narrower one
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    library.no_padding()
    library.no_truncation()
    return WordPiece(library, library.get_vocab_size())
