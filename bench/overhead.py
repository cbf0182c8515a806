"""What all but the model costs: tokens/s through scheduler, engine, text and HTTP on one core.

    python bench/overhead.py [--clients 64] [--tokens 256] [--seconds 6] [--profile] [--steps 400]

A device that answers at once stands where the accelerator would be. The server is pinned to one
core and the load generator to another. Then plan + commit alone, with up to 10,000 live requests
(bench/scheduler.py has it for every policy). Exit status 1 where less is reached than asked.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import cProfile
import json
import multiprocessing
import os
import platform
import pstats
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import scheduler as plan_commit

from fastserve_jax.api.sampling import TextRules
from fastserve_jax.core.ordering import FirstComeFirstServed
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import Plan, Request, Sampled, Sampling, StepResult
from fastserve_jax.engine import Engine
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.choice import Choice
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.lifecycle import listening
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState

FLOOR_TOKENS_PER_S = 20_000
MODEL = "overhead"
VOCAB = 32_000
_WORDS = [f" w{id}".encode() for id in range(VOCAB)]


class WordTokenizer:
    """As much work per token as a real one: a table of bytes and an incremental UTF-8 decoder."""

    vocab_size = VOCAB
    eos_ids = frozenset({2})
    chat_template = None
    named_tokens: dict[str, str] = {}  # noqa: RUF012

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [3 + len(word) for word in text.split()]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return b"".join(_WORDS[id] for id in ids).decode()

    def token_text(self, token: int) -> str:
        return _WORDS[token].decode()

    def token_bytes(self, token: int) -> bytes:
        return _WORDS[token]

    def stream(self, skip_special: bool = True, *, at_start: bool = False) -> WordStream:
        return WordStream()


class WordStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_WORDS[token])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class InstantRunner:
    def dispatch(self, plan: Plan) -> asyncio.Future[StepResult]:
        done = asyncio.get_running_loop().create_future()
        token = Sampled(100 + plan.step % 1000)
        drawn = {w.request_id: token for w in plan.work if w.samples}
        behind = {w.request_id: (token,) * len(w.guesses) for w in plan.work if w.guesses}
        done.set_result(StepResult(drawn, behind=behind))
        return done


def make_engine(clients: int, metrics: Metrics) -> tuple[Engine, Limits]:
    step_tokens = max(512, clients)
    limits = Limits(16, 8192, max_slots=clients, step_tokens=step_tokens, guesses=15)
    scheduler = Scheduler(limits, FirstComeFirstServed())
    return Engine(scheduler, InstantRunner(), on_step=metrics.of(MODEL).step), limits


async def serve(pipe: Connection, clients: int) -> None:
    metrics = Metrics(MODEL)
    state = ServerState(ServerConfig(port=0), metrics)
    engine, limits = make_engine(clients, metrics)
    async with engine, listening(state) as url:
        state.put(Served(MODEL, engine, WordTokenizer(), limits.max_context))
        state.ready()
        pipe.send(url)
        await asyncio.to_thread(pipe.recv)


def server_process(pipe: Connection, clients: int, core: int, profile: bool) -> None:
    pin(core)
    with cProfile.Profile() if profile else nullcontext() as profiler:
        asyncio.run(serve(pipe, clients))
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


class Load(asyncio.Protocol):
    """One client: streams one completion after the other until told to stop."""

    def __init__(self, request: bytes, deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._tail = b""
        self.tokens = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._tail = self._tail[-600:] + data
        if not self._tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            return
        usage = json.loads(self._tail.split(b"data: ")[-2])["usage"]
        self.tokens += usage["completion_tokens"]
        self._tail = b""
        if time.monotonic() < self._deadline:
            self._transport.write(self._request)
        else:
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionResetError("the server hung up"))


async def load(url: str, clients: int, tokens: int, seconds: float) -> float:
    """Tokens/s over all clients."""
    address = urlsplit(url)
    fields = {"prompt": "a b c d e f g h", "max_tokens": tokens, "ignore_eos": True}
    asked = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **fields}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
    start = time.monotonic()
    loop = asyncio.get_running_loop()
    host, port = address.hostname, address.port
    assert host is not None
    assert port is not None
    made = [
        await loop.create_connection(lambda: Load(request, start + seconds), host, port)
        for _ in range(clients)
    ]
    await asyncio.gather(*(client.done for _, client in made))
    return sum(client.tokens for _, client in made) / (time.monotonic() - start)


async def inside(clients: int, tokens: int, seconds: float, text: bool) -> float:
    """Tokens/s of the engine alone, or with the text layer, in this process."""
    metrics = Metrics(MODEL)
    engine, _ = make_engine(clients, metrics)
    tokenizer, rules, total = WordTokenizer(), TextRules(), 0

    async def client() -> None:
        nonlocal total
        while time.monotonic() < deadline:
            request = Request(engine.new_id(), tuple(range(3, 12)), Sampling(max_tokens=tokens))
            choice = Choice(tokenizer, rules, metrics.of(MODEL).request(9))
            async with engine.stream(request) as events:
                async for event in events:
                    if text:
                        choice.feed(event)
            total += tokens

    start = time.monotonic()
    deadline = start + seconds
    async with engine:
        await asyncio.gather(*(client() for _ in range(clients)))
    return total / (time.monotonic() - start)


def pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of each request")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--profile", action="store_true", help="profile the server; slower")
    parser.add_argument("--steps", type=int, default=400, help="of plan + commit alone")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(
        target=server_process, args=(there, asked.clients, cores[0], asked.profile)
    )
    server.start()
    pin(cores[-1])
    rate = asyncio.run(load(here.recv(), asked.clients, asked.tokens, asked.seconds))
    here.send(None)
    server.join()
    parts_s = max(1.0, asked.seconds / 3)
    engine = asyncio.run(inside(asked.clients, asked.tokens, parts_s, text=False))
    text = asyncio.run(inside(asked.clients, asked.tokens, parts_s, text=True))
    print(
        f"configuration: {asked.clients} clients streaming /v1/completions, {asked.tokens} tokens "
        f"each, instant device, server on 1 of {len(cores)} cores, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"over HTTP: {rate:,.0f} tokens/s  (floor {FLOOR_TOKENS_PER_S:,})")
    print(
        f"per token: {1e6 / rate:.1f} us = scheduler and engine {1e6 / engine:.1f} "
        f"+ text {1e6 / text - 1e6 / engine:.1f} + HTTP {1e6 / rate - 1e6 / text:.1f}"
    )
    is_quick = plan_commit.table(["adaptive"], steps=asked.steps)
    return 0 if rate >= FLOOR_TOKENS_PER_S and is_quick else 1


if __name__ == "__main__":
    sys.exit(main())
