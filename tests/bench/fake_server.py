"""A fake OpenAI server whose words are tokens: python fake_server.py PORT, or `fake` in a test."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fake:
    kind: str = "vllm"  # whose /tokenize it has: vllm, llama or none
    hidden_tokens: int = 0  # of every prompt, that /tokenize does not count
    chunk_tokens: int = 1  # so many tokens in one chunk
    chunk_s: float = 0.0
    fails: str = ""  # how a stream ends before its time: error, close or short
    spares: int = 0  # requests before it fails
    usage: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    clients: list[object] = field(default_factory=list)  # the far end of each one's connection
    running: int = 0
    most_running: int = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", health)
        app.router.add_get("/v1/models", models)
        app.router.add_post("/v1/completions", self.complete)
        if self.kind != "none":
            app.router.add_post("/tokenize", self.tokenize)
        return app

    def count(self, text: str) -> int:
        return sum(1 + (len(word) > 7) for word in text.split())

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("content", "") if self.kind == "llama" else body["prompt"]
        return web.json_response({"tokens": [1] * self.count(text)})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        assert request.transport is not None
        self.clients.append(request.transport.get_extra_info("peername"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self.stream(request, body)
        finally:
            self.running -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(chunk: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        is_failing = self.fails and len(self.asked) > self.spares
        for at in range(0, body["max_tokens"], self.chunk_tokens):
            if is_failing and at >= 2:
                break
            await asyncio.sleep(self.chunk_s)
            await send({"choices": [{"index": 0, "text": " word", "finish_reason": None}]})
        if is_failing and self.fails == "close":
            assert request.transport is not None
            request.transport.abort()
            return response
        if is_failing and self.fails == "error":
            await send({"error": {"message": "out of\nmemory"}})
        if is_failing:
            return response
        await send({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        prompt = self.count(body["prompt"]) + self.hidden_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        if self.usage:
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "fake"}]})


@asynccontextmanager
async def listening(fake: Fake, port: int = 0) -> AsyncIterator[str]:
    runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _serve(port: int) -> None:
    async with listening(Fake(), port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
