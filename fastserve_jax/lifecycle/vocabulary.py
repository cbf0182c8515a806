"""A tokenizer's files: trained from text, or those of a model, so that any folder has its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import msgspec
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.text.load import VOCABULARY

from .documents import END

KINDS = ("bpe", "sentencepiece")
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    VOCABULARY,
)
_LEAST = {"bpe": 257, "sentencepiece": 300}  # every byte, and what is no text


def train_vocabulary(texts: Iterator[str], kind: str, size: int, folder: Path) -> None:
    """Bytes where no piece fits, so that any text can be written. Raises ConfigError."""
    if kind not in KINDS:
        raise ConfigError(f"no vocabulary of kind {kind}: there are {', '.join(KINDS)}")
    if size < _LEAST[kind]:
        raise ConfigError(f"a vocabulary of {size} is too small: {_LEAST[kind]} at the least")
    folder.mkdir(parents=True, exist_ok=True)
    (_train_bpe if kind == "bpe" else _train_sentencepiece)(texts, size, folder)


def _train_bpe(texts: Iterator[str], size: int, folder: Path) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    (folder / "tokenizer.json").write_text(library.to_str(pretty=True), encoding="utf-8")
    named = {"eos_token": END, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=1))


def _train_sentencepiece(texts: Iterator[str], size: int, folder: Path) -> None:
    made = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=made,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
    except RuntimeError as error:  # it counts what the text can give
        raise ConfigError(f"no vocabulary of {size} from this text: {error}") from error
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=1))


def vocabulary_files(source: Path | Mapping[str, object]) -> dict[str, bytes]:
    """Of a model, by their names. Raises ModelFileError."""
    if isinstance(source, Mapping):
        return {VOCABULARY: msgspec.msgpack.encode(dict(source), enc_hook=_plain)}
    found = {name: (source / name).read_bytes() for name in _FILES if (source / name).is_file()}
    if not found:
        raise ModelFileError(f"{source}: no tokenizer is there")
    return found


def copy_vocabulary(source: Path | Mapping[str, object], folder: Path) -> None:
    """Of a model into a folder that has none. Raises ModelFileError."""
    files = vocabulary_files(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _plain(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else value
