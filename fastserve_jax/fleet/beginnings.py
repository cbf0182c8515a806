"""What a router can tell of a request without a tokenizer: names of its beginnings, and its weight.

Reads what it understands and passes over the rest: that a body is wrong, a replica will say.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 256
BYTES_PER_TOKEN = 4  # of English text, about
BLOCK_TOKENS = BLOCK_BYTES / BYTES_PER_TOKEN
_MOST_BLOCKS = 256  # of one prompt: what comes later tells nothing more
_MOST_ANSWER = 512  # tokens, of a request that allows more or does not say
_PROMPTS = ("messages", "prompt", "input")
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Beginnings:
    """`names` of beginnings, each a block longer than the one before; `tokens` in all, about;
    `follows` is the id of a response that it goes on from."""

    names: tuple[bytes, ...] = ()
    tokens: float = _MOST_ANSWER
    follows: str = ""


def beginnings(body: bytes) -> Beginnings:
    try:
        asked = json.loads(body)
        return _read(asked) if isinstance(asked, dict) else Beginnings()
    except (ValueError, RecursionError):  # what json reads, it may be unable to write
        return Beginnings()


def _read(asked: dict[str, Any]) -> Beginnings:
    text = b"".join(_text(asked[key]) for key in _PROMPTS if key in asked)
    # What is not shared between models and salts is not looked for there, either.
    name = hashlib.blake2b(repr((asked.get("model"), asked.get("cache_salt"))).encode()).digest()
    names = []
    for at in range(0, min(len(text), _MOST_BLOCKS * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        name = hashlib.blake2b(name + text[at : at + BLOCK_BYTES], digest_size=16).digest()
        names.append(name)
    limits = [asked[key] for key in _LIMITS if isinstance(asked.get(key), int)]
    answer = min(max(0, *limits), _MOST_ANSWER) if limits else _MOST_ANSWER
    follows = asked.get("previous_response_id")
    return Beginnings(
        tuple(names),
        len(text) / BYTES_PER_TOKEN + answer,
        follows if isinstance(follows, str) else "",
    )


def _text(value: Any) -> bytes:
    """Such that what continues a conversation begins with it."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, list):
        return b"".join(_text(item) + b"\0" for item in value)
    return json.dumps(value).encode()
