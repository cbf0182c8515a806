"""A model as the server has it: its name, its engine and its text. Says what the server needs of
an engine and a tokenizer; knows no route.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.api.sampling import Defaults, ModelBounds
from fastserve_jax.core.types import Adapter, Event, Request
from fastserve_jax.encoding import Encodings


class Generator(Protocol):
    """The engine, as the server uses it."""

    @property
    def failure(self) -> BaseException | None: ...
    def new_id(self) -> int: ...
    def time(self) -> float: ...
    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...


class TokenStream(Protocol):
    def push(self, token: int, /) -> str: ...
    def flush(self) -> str: ...


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def named_tokens(self) -> Mapping[str, str]: ...
    def encode(self, text: str, add_special: bool = True, /) -> list[int]: ...
    def decode(self, ids: Iterable[int], skip_special: bool = True, /) -> str: ...
    def token_text(self, token: int, /) -> str: ...
    def token_bytes(self, token: int, /) -> bytes: ...
    def stream(self, skip_special: bool = True, *, at_start: bool = False) -> TokenStream: ...


class ChatTemplate(Protocol):
    def encode(
        self,
        messages: Sequence[ChatTurn],
        *,
        tools: Sequence[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...


class LoadedAdapter(Protocol):
    @property
    def adapter(self) -> Adapter: ...
    @property
    def reference(self) -> str: ...
    @property
    def created(self) -> int: ...


class Adapters(Protocol):
    """What is loaded beside a model, by name, and may come and go."""

    @property
    def loaded(self) -> Mapping[str, LoadedAdapter]: ...
    async def load(self, name: str, reference: str) -> None: ...
    def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model with its engine."""

    name: str  # what clients put in `model`
    engine: Generator
    tokenizer: Tokenizer
    context: int  # tokens, prompt and output together
    template: ChatTemplate | None = None
    defaults: Defaults = field(default_factory=Defaults)
    opening: tuple[int, ...] = ()  # ids that every answer begins behind, whatever the prompt is
    root: str = ""  # which model or version that is, where it is not the name
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds
    adapters: Adapters | None = None  # None: there is no room for any
    adapter: Adapter | None = None  # what it is asked with, beside
    parent: str = ""  # the name of the model itself

    def beside(self) -> list[Served]:
        """With each of its adapters, by the adapter's name."""
        return [
            replace(
                self,
                name=name,
                root=held.reference,
                created=held.created,
                adapters=None,
                adapter=held.adapter,
                parent=self.name,
            )
            for name, held in (self.adapters.loaded.items() if self.adapters else ())
        ]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2s(f"{self.name}:{self.root}:{self.created}".encode(), digest_size=5)
        return f"fs_{digest.hexdigest()}"


class Words(Protocol):
    """How an encoder reads texts."""

    @property
    def vocab_size(self) -> int: ...
    def encode_pair(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True, slots=True)
class ServedEncoder:
    """A loaded encoder with its loop. With `labels` it is a classifier, and has no vectors."""

    name: str
    encodings: Encodings
    words: Words
    context: int  # tokens of one text
    size: int  # of a vector
    labels: tuple[str, ...] = ()
    root: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Encodings:
        return self.encodings


type Entry = Served | ServedEncoder


def bounds(served: Served, max_choices: int) -> ModelBounds:
    return ModelBounds(
        vocab_size=served.tokenizer.vocab_size,
        context=served.context,
        eos_ids=frozenset(served.tokenizer.eos_ids),
        max_choices=max_choices,
        defaults=served.defaults,
    )
