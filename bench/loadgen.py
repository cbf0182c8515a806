"""Requests against one running OpenAI-compatible server, and what they took.

Prompts are text of exactly so many tokens as that server counts them, and no two are alike. Tokens
are counted by the usage at the end of each stream, times by the chunks that carry text.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
import prompts

from fastserve_jax.api.sse import EventParser


class LoadError(Exception):
    """What a server did wrong, in one line."""


@dataclass(frozen=True, slots=True)
class Answer:
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    gaps_s: tuple[float, ...]  # between chunks
    done_at: float


class Server:
    """Use as `async with`, which asks the server for its model and how it counts tokens."""

    def __init__(
        self,
        name: str,
        url: str,
        model: str | None = None,
        *,
        rules: Mapping[str, Any] | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self.name, self._url = name, url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self._rules = rules or {"temperature": 0}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=timeout_s)
        self._tokenize: dict[str, Any] | None = None
        self._unseen = 0  # tokens of a request that /tokenize does not count

    async def __aenter__(self) -> Self:
        # llama.cpp hangs up after a stream without saying so: nothing is sent on a used connection
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        try:
            if not self.model:
                _, models = await self._json("GET", "/v1/models")
                self.model = models["data"][0]["id"] if models.get("data") else "default"
            await self._learn_to_count()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def prompt(self, chance: random.Random, tokens: int) -> str:
        """As near to `tokens` as words can be chosen; the usage has the truth."""
        return " ".join(await prompts.exactly(tokens, self._count, chance))

    async def ask(self, prompt: str, output: int, due: float | None = None) -> Answer:
        """Streams one completion. Latency counts from when it was due, else from now."""
        began = time.perf_counter() if due is None else due
        body = {"model": self.model, "prompt": prompt, "max_tokens": output, **self._rules}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        stamps: list[float] = []
        usage: dict[str, int] | None = None
        is_done = False
        try:
            async with self._session.post(self._url + "/v1/completions", json=body) as response:
                if response.status != 200:
                    raise self._error(f"HTTP {response.status}: {await response.text()}")
                parser = EventParser()
                async for piece in response.content.iter_any():
                    now = time.perf_counter()
                    for event in parser.push(piece):
                        if event.data == "[DONE]":
                            is_done = True
                            continue
                        chunk = msgspec.json.decode(event.data)
                        if "error" in chunk:
                            raise self._error(f"failed in mid-stream: {chunk['error']}")
                        usage = chunk.get("usage") or usage
                        if any(
                            c.get("text") or not c.get("finish_reason") for c in chunk["choices"]
                        ):
                            stamps.append(now)
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
            at = f"after {len(stamps)} chunks" if stamps else "before the first token"
            raise self._error(f"{type(error).__name__} {at}: {error}") from error
        if not is_done:
            raise self._error(f"the stream ended after {len(stamps)} chunks without [DONE]")
        if not usage or not {"prompt_tokens", "completion_tokens"} <= usage.keys():
            raise self._error("sends no usage in its stream, so tokens cannot be counted")
        done_at = time.perf_counter()
        first = stamps[0] if stamps else done_at
        gaps = tuple(after - before for before, after in pairwise(stamps))
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        return Answer(*counts, first - began, gaps, done_at)

    async def _learn_to_count(self) -> None:
        chance = random.Random("how does it count?")
        words = [prompts.word(chance) for _ in range(8)]
        text = " ".join(words)
        for shape in ({"model": self.model, "prompt": ""}, {"content": "", "add_special": True}):
            field = "prompt" if "prompt" in shape else "content"
            status, answer = await self._json("POST", "/tokenize", {**shape, field: text})
            if status == 200 and answer.get("tokens"):
                self._tokenize = shape
                counted = await self._count(words)
                self._unseen = (await self.ask(text, 1)).prompt_tokens - counted
                return

    async def _count(self, words: list[str]) -> int:
        if self._tokenize is None:  # asked in another order, that no prefix cache know them later
            swapped = " ".join([*words[1:2], *words[:1], *words[2:]])
            return (await self.ask(swapped, 1)).prompt_tokens
        field = "prompt" if "prompt" in self._tokenize else "content"
        body = {**self._tokenize, field: " ".join(words)}
        status, answer = await self._json("POST", "/tokenize", body)
        if status != 200 or "tokens" not in answer:
            raise self._error(f"/tokenize answers HTTP {status}: {answer}")
        return len(answer["tokens"]) + self._unseen

    async def _json(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Status and answer; an empty one where it is no JSON object."""
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._error(f"{path}: {type(error).__name__}: {error}") from error
        try:
            return response.status, msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.MsgspecError:
            return response.status, {}

    def _error(self, what: str) -> LoadError:
        return LoadError(f"{self.name} ({self._url}): {' '.join(what.split())[:300]}")


async def closed(server: Server, texts: list[str], output: int, clients: int) -> list[Answer]:
    """So many clients, each sending its next request when the last is answered."""
    left = iter(texts)

    async def client() -> list[Answer]:
        return [await server.ask(text, output) for text in left]

    return [answer for each in await _all(client() for _ in range(clients)) for answer in each]


async def arriving(
    server: Server, texts: list[str], output: int, rate: float, chance: random.Random
) -> list[Answer]:
    """Poisson arrivals, so many a second, however slow the answers."""

    async def one(text: str, due: float) -> Answer:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await server.ask(text, output, due)

    due, requests = time.perf_counter(), []
    for text in texts:
        requests.append(one(text, due))
        due += chance.expovariate(rate)
    return await _all(requests)


async def _all[T](running: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return; when one fails the others are called off."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in running]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
