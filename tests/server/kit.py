"""A whole server on a loopback socket: real engine and scheduler, fake device, 64-token text."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import aiohttp

from fastserve_jax.api.sse import EventParser, ServerEvent
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import Request, Sampling
from fastserve_jax.engine import Engine
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.lifecycle import listening
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState

from ..fakes import VOCAB, FakeDevice, FakeRunner, alone

MODEL = "fake-model"
BOS, EOS = 0, 1
_PIECES = (
    b"<s>",
    b"</s>",
    *(bytes([c]) for c in b" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:\n"),
    b"\xc3",
    b"\xa9",  # the two halves of é
    b"the",
)
PIECES = _PIECES + (b"",) * (VOCAB - len(_PIECES))
_IDS = {piece: id for id, piece in enumerate(_PIECES) if len(piece) == 1}


class LetterTokenizer:
    """A token per byte of a few letters, "é" in two halves, and one word. Others become "?"."""

    vocab_size = VOCAB
    eos_ids = frozenset({EOS})
    chat_template = "the template's source"
    named_tokens: ClassVar = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        ids = [_IDS.get(bytes([byte]), _IDS[b"?"]) for byte in text.encode()]
        return [BOS, *ids] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        stream = self.stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def token_bytes(self, id: int) -> bytes:
        return PIECES[id]

    def token_text(self, id: int) -> str:
        try:
            return PIECES[id].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in PIECES[id])

    def stream(self, skip_special: bool = True, *, at_start: bool = False) -> LetterStream:
        return LetterStream(skip_special)


class LetterStream:
    def __init__(self, skip_special: bool) -> None:
        self._skip = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(b"" if self._skip and id in (BOS, EOS) else PIECES[id])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTemplate:
    """A line per message."""

    def __init__(self, tokenizer: LetterTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(
        self,
        messages: Sequence[dict[str, object]],
        *,
        tools: Sequence[dict[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        if add_generation_prompt:
            lines.append("assistant: ")
        return self._tokenizer.encode("".join(lines))


LIMITS = Limits(page_size=8, num_pages=512, max_slots=16, step_tokens=128, max_context=512)


@dataclass
class Kit:
    url: str
    state: ServerState
    engine: Engine
    device: FakeDevice
    session: aiohttp.ClientSession

    async def post(self, path: str, body: object, **kwargs: object) -> aiohttp.ClientResponse:
        return await self.session.post(self.url + path, json=body, **kwargs)

    async def json(self, path: str, body: object, status: int = 200) -> dict:
        async with await self.post(path, body) as answer:
            assert answer.status == status, await answer.text()
            return await answer.json()

    async def quiet(self) -> None:
        """Fails unless the engine comes to own nothing."""
        async with asyncio.timeout(10):
            await self.engine.drain()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.ending, stats.pages_used) == (0, 0, 0, 0)


@asynccontextmanager
async def kit(
    config: ServerConfig | None = None,
    *,
    limits: Limits = LIMITS,
    delay_s: float = 0.0,
    nan: Sequence[tuple[int, int]] = (),
    fail_at: int | None = None,
    ready: bool = True,
    policy: str = "fcfs",
) -> AsyncIterator[Kit]:
    config = replace(config or ServerConfig(), port=0)
    metrics = Metrics(MODEL)
    device = FakeDevice(limits, nan=nan)
    runner = FakeRunner(device, delay_s=delay_s, fail_at=fail_at)
    tokenizer = LetterTokenizer()
    state = ServerState(config, metrics)
    cost = CostModel(page_bytes=1024)
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost)
    headers = {"Authorization": f"Bearer {config.api_keys[0]}"} if config.api_keys else {}
    async with (
        Engine(scheduler, runner, on_step=metrics.of(MODEL).step) as engine,
        listening(state) as url,
        aiohttp.ClientSession(headers=headers) as session,
    ):
        if ready:
            state.put(Served(MODEL, engine, tokenizer, limits.max_context, FakeTemplate(tokenizer)))
            state.ready()
        with metrics.of(MODEL).watching(engine.stats, limits.page_size):
            yield Kit(url, state, engine, device, session)


def token_ids(text: str) -> list[int]:
    return LetterTokenizer().encode(text)


def answer_to(prompt: list[int], seed: int, max_tokens: int, eos: bool = True) -> tuple[str, str]:
    """(text, finish reason) that the fake device must lead to, worked out without the server."""
    stop_ids = frozenset({EOS}) if eos else frozenset[int]()
    sampling = Sampling(max_tokens=max_tokens, seed=seed, stop_ids=stop_ids)
    tokens, finish = alone(Request(0, tuple(prompt), sampling))
    shown = [token for token in tokens if token not in stop_ids]
    return LetterTokenizer().decode(shown), finish.value


async def events_of(answer: aiohttp.ClientResponse) -> list[ServerEvent]:
    """All server-sent events of a streamed answer."""
    assert answer.status == 200, await answer.text()
    assert answer.content_type == "text/event-stream"
    return EventParser().push(await answer.read())
