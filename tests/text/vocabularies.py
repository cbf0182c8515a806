"""Small vocabularies, trained on the spot, in every form a model's files may have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER = "<tool_call>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "It's 1969; they're here, we've 12 000 things, don't we? I'll say: \"no\"...",
    "Grüße aus Köln, 你好世界, 🙂🙃 naïve café \t tabs  and   spaces",
    "<|im_start|>user\nwhat is <|im_end|> for <tool_call>?",
] * 4


def byte_level() -> Tokenizer:
    """A byte-level BPE as GPT-2's, by the library's own trainer and cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([USER])
    return tokenizer


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """The same vocabulary as a GGUF holds it."""
    data = json.loads(byte_level().to_str())
    vocab: dict[str, int] = data["model"]["vocab"] | {USER: len(data["model"]["vocab"])}
    tokens = sorted(vocab, key=vocab.__getitem__)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if t in CONTROL else 4 if t == USER else 1 for t in tokens],
        "merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}
    return metadata | {"tokenizer.chat_template": CHATML}


def write_byte_level_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "add_bos_token": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


def sentencepiece_model(*, prefix: bool = True, controls_match_text: bool = False) -> bytes:
    """A SentencePiece BPE with byte fallback. `controls_match_text`: as files that leave it to
    other files to say which pieces are control tokens."""
    out = io.BytesIO()
    kind = "user_defined_symbols" if controls_match_text else "control_symbols"
    symbols: dict[str, list[str]] = {"user_defined_symbols": [], "control_symbols": []}
    symbols["user_defined_symbols"].append(USER)
    symbols[kind] += CONTROL[1:]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
        **{key: value for key, value in symbols.items() if value},
    )
    return out.getvalue()


def sentencepiece_metadata(*, prefix: bool = True, **changes: Any) -> dict[str, Any]:
    """The same vocabulary as a GGUF holds it."""
    model = proto.ModelProto.FromString(sentencepiece_model(prefix=prefix))
    fields = {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": prefix,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}
    return metadata | {"tokenizer.chat_template": CHATML}


def write_sentencepiece_folder(folder: Path, *, prefix: bool = True, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = sentencepiece_model(prefix=prefix, controls_match_text=True)
    (folder / "tokenizer.model").write_bytes(data)
    pieces = [piece.piece for piece in proto.ModelProto.FromString(data).pieces]
    added = {str(pieces.index(text)): {"content": text, "special": True} for text in CONTROL[1:]}
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "added_tokens_decoder": added,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


def write_sentencepiece_json(folder: Path) -> Path:
    """The same vocabulary as the tokenizer.json of a Llama: BPE over text with U+2581."""
    folder.mkdir(exist_ok=True)
    data = sentencepiece_model()
    pieces = proto.ModelProto.FromString(data).pieces
    vocab = {piece.piece: id for id, piece in enumerate(pieces)}
    normal = [piece for piece in pieces if piece.type == piece.NORMAL]
    by_rank = sorted(normal, key=lambda piece: -piece.score)
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in by_rank
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in vocab and piece.piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *CONTROL[1:]])
    tokenizer.add_tokens([USER])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folder
