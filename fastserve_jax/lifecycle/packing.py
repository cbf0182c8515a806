"""Documents as rows of tokens that a model is trained on: packed behind each other, none padded
more than it must be.

A row has `context` tokens. Which of them belong together is said by a number that grows within the
row, so that attention stays within a document; and each token's weight says whether it is learned
(an answer) or only read (a question, padding). Knows tokens, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import InvalidRequest
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.tokenizer import Tokenizer

from .documents import Document


class Piece(NamedTuple):
    """Of one document; `learned` is of each token."""

    tokens: Sequence[int]
    learned: Sequence[bool]


class Rows(NamedTuple):
    """[rows, context] each."""

    tokens: NDArray[np.uint32]
    segments: NDArray[np.uint16]
    learned: NDArray[np.bool_]


@dataclass(slots=True)
class Packer:
    """Text goes on in the next row where one ends; a conversation that does not fit begins one, is
    cut where it is longer than a row, and left out if there is no answer in what remains."""

    context: int
    cut: int = 0  # of the conversations that are here
    unanswered: int = 0  # conversations left out
    _rows: list[list[Piece]] = field(default_factory=list)
    _room: int = 0

    def add(self, piece: Piece, *, whole: bool) -> None:
        tokens, learned = piece
        if whole:
            tokens, learned = tokens[: self.context], learned[: self.context]
            if not any(learned):
                self.unanswered += 1
                return
            self.cut += len(piece.tokens) > self.context
        while tokens:
            if not self._room or (whole and len(tokens) > self._room):
                self._rows.append([])
                self._room = self.context
            count = min(len(tokens), self._room)
            self._rows[-1].append(Piece(tokens[:count], learned[:count]))
            self._room -= count
            tokens, learned = tokens[count:], learned[count:]

    def rows(self) -> Rows:
        shape = len(self._rows), self.context
        made = Rows(np.zeros(shape, np.uint32), np.zeros(shape, np.uint16), np.zeros(shape, bool))
        for row, pieces in enumerate(self._rows):
            at = 0
            for number, (tokens, learned) in enumerate(pieces):
                end = at + len(tokens)
                made.tokens[row, at:end], made.learned[row, at:end] = tokens, learned
                made.segments[row, at:end] = number
                at = end
            made.segments[row, at:] = len(pieces)
        return made


def piece_of(document: Document, tokenizer: Tokenizer, template: ChatTemplate, end: int) -> Piece:
    """Raises InvalidRequest for what the tokenizer or the template refuses."""
    if document.messages:
        return _conversation(document, template)
    tokens = [*tokenizer.encode(document.text), end]
    return Piece(tokens, [True] * len(tokens))


def _conversation(document: Document, template: ChatTemplate) -> Piece:
    """What an assistant says is learned, with the token that ends it; only read is what it says
    first of all, and what the template writes otherwise once more follows (as Qwen3's does)."""
    messages = document.messages
    tokens = template.encode(messages, add_generation_prompt=False)
    learned = [False] * len(tokens)
    answers = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
    for number in answers:
        asked = template.encode(messages[:number], add_generation_prompt=True)
        answered = template.encode(messages[: number + 1], add_generation_prompt=False)
        if tokens[: len(answered)] == answered and answered[: len(asked)] == asked:
            learned[len(asked) : len(answered)] = [True] * (len(answered) - len(asked))
    if answers and not any(learned):
        raise InvalidRequest("the chat template does not write an answer behind its question")
    return Piece(tokens, learned)


def end_token(tokenizer: Tokenizer) -> int:
    """What stands behind a document."""
    named = tokenizer.control_texts.get(tokenizer.named_tokens.get("eos_token", ""))
    if named is not None:
        return named
    if not tokenizer.eos_ids:
        raise InvalidRequest("the tokenizer has no token that ends a text")
    return min(tokenizer.eos_ids)
