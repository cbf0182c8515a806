"""What every handler shares: the model once it is loaded, the phase, and the work in flight.

Says what the server needs of an engine and a tokenizer; knows no route.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.api.sampling import Defaults, ModelBounds
from fastserve_jax.core.types import Event, Request
from fastserve_jax.encoding import Encodings
from fastserve_jax.errors import EngineFailed, InvalidRequest, ModelNotFound, Overloaded
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.slow_readers import SlowReaders
from fastserve_jax.server.store import ResponseStore


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
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2s(f"{self.name}:{self.created}".encode(), digest_size=5)
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
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Encodings:
        return self.encodings


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ServerState:
    """Owned by one application; every method runs on its loop."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.phase = Phase.LOADING
        self.slow_readers = SlowReaders(config.send_timeout_s)
        metrics.observe(lambda: {"slow_readers_dropped_total": self.slow_readers.dropped})
        self.responses = ResponseStore(
            config.stored_responses, config.stored_bytes, config.stored_ttl_s
        )
        self.draining = asyncio.Event()
        self.sockets = 0
        self.in_flight = 0
        self._served: Served | ServedEncoder | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, served: Served | ServedEncoder) -> None:
        """The model is loaded and warm: work is taken from now on."""
        self._served = served
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    @property
    def failed(self) -> bool:
        """The engine is gone for good."""
        return self._served is not None and self._served.engine.failure is not None

    def drain(self) -> None:
        """Take no new work; what was accepted goes on."""
        self.phase = Phase.DRAINING
        self.draining.set()

    async def idle(self) -> None:
        await self._idle.wait()

    @property
    def anything(self) -> Served | ServedEncoder:
        """Raises Overloaded while loading or draining, EngineFailed when failed."""
        if self.failed:
            raise EngineFailed("the engine has stopped; the server must be restarted")
        if self.phase is Phase.DRAINING:
            raise Overloaded("the server is shutting down", retry_after_s=5)
        if self._served is None:
            raise Overloaded("the model is still loading", retry_after_s=5)
        return self._served

    @property
    def served(self) -> Served:
        """What `anything` raises, and InvalidRequest of an encoder."""
        return self.model(None)

    def model(self, name: str | None) -> Served:
        served = self.named(name)
        if isinstance(served, ServedEncoder):
            raise InvalidRequest(
                f"{served.name} is an encoder and writes nothing: ask /v1/embeddings, /classify or "
                "/score",
                param="model",
            )
        return served

    def encoder(self, name: str | None) -> ServedEncoder:
        served = self.named(name)
        if isinstance(served, Served):
            raise InvalidRequest(
                f"{served.name} is no encoder: ask /v1/chat/completions or /v1/completions",
                param="model",
            )
        return served

    def named(self, name: str | None) -> Served | ServedEncoder:
        served = self.anything
        if name is not None and name != served.name:
            raise ModelNotFound(
                f"model {name[:100]!r} is not served here; ask for {served.name!r}", param="model"
            )
        return served

    @contextmanager
    def work(self) -> Iterator[None]:
        """Counts as accepted work: a drain waits for it."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()


def bounds(state: ServerState, served: Served) -> ModelBounds:
    return ModelBounds(
        vocab_size=served.tokenizer.vocab_size,
        context=served.context,
        eos_ids=frozenset(served.tokenizer.eos_ids),
        max_choices=state.config.max_choices,
        defaults=served.defaults,
    )
