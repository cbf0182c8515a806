"""Text to token ids and back, whatever the vocabulary came from.

Encoding never makes a control token out of text. Decoding goes by a table of each token's bytes,
so a stream costs a lookup per token. Knows no files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastserve_jax.errors import InvalidRequest
from fastserve_jax.text.matching import any_of

Encode = Callable[[str, bool], list[int]]  # (text, whether it opens the sequence), no specials

_MAX_CONTROL_BYTES = 200  # a longer name is no name; templates cannot write it

_new_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer file says, read once.

    `pieces` holds every token's bytes by id, control tokens with their text. `control` are the
    ids that only templates and the model itself may write. `space_prefix`: the vocabulary begins
    a text with a space of its own, which decoding takes away again.
    """

    pieces: tuple[bytes, ...]
    control: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    space_prefix: bool
    prefix_after_control: bool  # also to text behind a control token
    chat_template: str | None
    named: Mapping[str, str]  # bos_token, eos_token, unk_token, pad_token: their texts
    # Ids behind every text that an encoder reads. What is written then is a text of its own, and
    # does not continue that one.
    closing: tuple[int, ...] = ()


class Tokenizer:
    """A vocabulary and a way to encode with it. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self._encode = encode
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self._visible = tuple(
            b"" if id in vocabulary.control else piece for id, piece in enumerate(vocabulary.pieces)
        )
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.chat_template = vocabulary.chat_template
        self.named_tokens = vocabulary.named
        self.control_texts: Mapping[str, int] = {
            vocabulary.pieces[id].decode("utf-8", "replace"): id
            for id in sorted(vocabulary.control, reverse=True)
            if 1 < len(vocabulary.pieces[id]) <= _MAX_CONTROL_BYTES
        }
        self._controls = re.compile(f"({any_of(self.control_texts)})")

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids; none is a control token but those that `add_special` puts in front and behind.

        Raises InvalidRequest for text that is not Unicode (a lone surrogate).
        """
        ids = self.encode_plain(text)
        if add_special and self.add_bos:
            assert self.bos_id is not None
            ids.insert(0, self.bos_id)
        return [*ids, *self._vocabulary.closing] if add_special else ids

    def encode_plain(self, text: str, *, at_start: bool = True) -> list[int]:
        """Token ids of one stretch of text; `at_start` is False behind other text or tokens."""
        if not text:
            return []
        try:
            return self._encode(text, at_start)
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"text is not valid Unicode: a lone surrogate at character {error.start}"
            ) from error

    def encode_template(self, text: str, sentinel: str = "") -> list[int]:
        """Token ids of a rendered chat template: control tokens by their texts, the rest plain.

        `sentinel` is a character that the caller put into text of users wherever it would have
        read like a control token; it is taken out of the plain stretches. BOS is put in front
        if the vocabulary wants one and the template has not written it.
        """
        ids: list[int] = []
        for stretch in self._controls.split(text):
            if stretch in self.control_texts:
                ids.append(self.control_texts[stretch])
                continue
            plain = stretch.replace(sentinel, "") if sentinel else stretch
            at_start = self._vocabulary.prefix_after_control or not ids
            ids += self.encode_plain(plain, at_start=at_start)
        if self.add_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            ids.insert(0, self.bos_id)
        return [*ids, *self._vocabulary.closing]

    def decode(
        self, ids: Iterable[int], skip_special: bool = True, *, at_start: bool = True
    ) -> str:
        """Text of a whole sequence. `at_start` is False for what continues a prompt, which then
        keeps its leading space. Bytes that are not UTF-8 become U+FFFD; so does nothing else."""
        stream = self.stream(skip_special, at_start=at_start)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, skip_special: bool = True, *, at_start: bool = False) -> TokenStream:
        """An incremental decode; by default of tokens that continue a prompt."""
        at_start = at_start or bool(self._vocabulary.closing)
        pieces = self._visible if skip_special else self._pieces
        control = self._vocabulary.control
        return TokenStream(pieces, control, at_start and self._vocabulary.space_prefix)

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to a text; of a control token, its name. Empty for unused ids."""
        return self._pieces[id] if 0 <= id < self.vocab_size else b""

    def token_text(self, id: int) -> str:
        """The token in print; part of a character is shown as `bytes:\\xe2\\x82`."""
        piece = self.token_bytes(id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def is_control(self, id: int) -> bool:
        return id in self._vocabulary.control


class TokenStream:
    """Text of a sequence as its tokens come.

    The pushes and the flush together equal Tokenizer.decode of the same ids with the same
    arguments, always. A character is held back until its last byte has come.
    """

    __slots__ = ("_control", "_decoder", "_drop_space", "_pieces")

    def __init__(self, pieces: Sequence[bytes], control: frozenset[int], drop_space: bool) -> None:
        self._pieces = pieces
        self._control = control
        self._drop_space = drop_space
        self._decoder = _new_decoder("replace")

    def push(self, id: int) -> str:
        """The text that this token makes certain, often empty. Unused ids have no text."""
        piece = self._pieces[id] if 0 <= id < len(self._pieces) else b""
        if self._drop_space and id not in self._control:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
