"""Makes a tokenizer from what a model's files offer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastserve_jax.text.folder_vocabulary import tokenizer_from_folder
from fastserve_jax.text.gguf_vocabulary import tokenizer_from_gguf
from fastserve_jax.text.tokenizer import Tokenizer


def load_tokenizer(source: Path | Mapping[str, object]) -> Tokenizer:
    """From a Hugging Face folder, or the tokenizer.* metadata of a GGUF. Raises ModelFileError."""
    if isinstance(source, Path):
        return tokenizer_from_folder(source)
    return tokenizer_from_gguf(source)
