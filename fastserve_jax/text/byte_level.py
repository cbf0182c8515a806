"""Byte-level BPE: its alphabet, and how each named pre-tokenizer cuts text into words."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

from fastserve_jax.errors import ModelFileError

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ENDS = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_ENDS}"
_MODERN = (  # GPT-4's cut; families differ in how many digits make a word
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_ENDS}"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_ENDS}"
)
_LLAMA3 = _MODERN % "{1,3}"
_QWEN2 = _MODERN % ""

_WORDS = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _GPT2,
    "starcoder": _GPT2,
    "refact": _GPT2,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact"})  # every digit a word of its own
# Words that are tokens already are taken whole, whatever the merges would make of them.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
# These vocabularies begin with BOS unless the file says otherwise.
BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})


def word_cutter(pre: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that a GGUF calls `pre`. Raises ModelFileError for one not known."""
    if pre not in _WORDS:
        raise ModelFileError(
            f"pre-tokenizer {pre!r} is not known; these are: {', '.join(sorted(_WORDS))}"
        )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre in _SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.Split(Regex(_WORDS[pre]), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _alphabet() -> dict[int, str]:
    """From a letter of the vocabulary to the Latin-1 letter whose code is the byte it stands for.

    Printable bytes stand for themselves; the others take the letters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {0x100 + index: chr(byte) for index, byte in enumerate(others)}
    return letters


_LETTERS = _alphabet()


def token_to_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; one with letters outside the alphabet is text."""
    try:
        return token.translate(_LETTERS).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")
