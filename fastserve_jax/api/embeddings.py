"""/v1/embeddings, /classify and /score on the wire."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import cast

import msgspec

from fastserve_jax.api.usage import Usage
from fastserve_jax.errors import InvalidRequest

type Input = str | list[int]


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest."""
        if self.encoding_format not in (None, "float", "base64"):
            raise InvalidRequest("encoding_format is float or base64", param="encoding_format")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions must be at least 1", param="dimensions")


class ClassifyRequest(msgspec.Struct, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None


class ScoreRequest(msgspec.Struct, kw_only=True):
    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """One with each of several, or each with its own. Raises InvalidRequest."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if not first or len(first) != len(second):
            raise InvalidRequest(
                f"{len(first)} of text_1 and {len(second)} of text_2: one, or as many as the other",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


def inputs(given: str | list[str | int | list[int]], most: int) -> list[Input]:
    """Each text, or its tokens. Raises InvalidRequest for none, too many, or a mixture."""
    if isinstance(given, str):
        found: list[Input] = [given]
    elif given and all(isinstance(one, int) for one in given):
        found = [cast(list[int], given)]
    elif len(set(map(type, given))) > 1 or int in map(type, given):
        raise InvalidRequest("input mixes texts and tokens", param="input")
    else:
        found = cast(list[Input], given)
    if not found or not all(found):
        raise InvalidRequest("input must not be empty", param="input")
    if len(found) > most:
        raise InvalidRequest(f"at most {most} texts in one request", param="input")
    return found


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingAnswer(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: Usage
    object: str = "list"


class Class(msgspec.Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyAnswer(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Class]
    usage: Usage
    object: str = "list"


class Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class ScoreAnswer(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: Usage
    object: str = "list"


def encoded(numbers: Sequence[float], as_base64: bool) -> list[float] | str:
    """Little-endian float32, as OpenAI's clients read them."""
    if not as_base64:
        return list(numbers)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii")
