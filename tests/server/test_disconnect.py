"""Readers that leave, and readers that stay without reading."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace

import aiohttp
import pytest

from fastserve_jax.server.config import ServerConfig

from .kit import LIMITS, MODEL, Kit, answer_to, events_of, kit, token_ids

LONG = {"model": MODEL, "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "seed": 3}


async def until(condition, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  (conditions of other rooms have no events)
            await asyncio.sleep(0.005)


def running(server: Kit) -> int:
    return server.engine.stats().running


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
async def test_a_client_that_leaves_frees_its_request_at_once(fields):
    async with kit(delay_s=0.01) as server, aiohttp.ClientSession() as session:
        url = server.url + "/v1/completions"
        asking = asyncio.create_task(session.post(url, json={**LONG, **fields}))
        await until(lambda: running(server) == fields.get("n", 1))
        if fields.get("stream"):
            (await asking).close()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await session.close()
        steps = server.engine.stats().steps
        await until(lambda: running(server) == 0)
        assert server.engine.stats().steps - steps <= 5
        await server.quiet()
        await until(lambda: server.state.in_flight == 0)
        assert server.state.metrics.of(MODEL).finished["abort"] == fields.get("n", 1)


async def test_a_client_that_leaves_the_queue_frees_its_place():
    limits = replace(LIMITS, max_slots=1)
    async with kit(limits=limits, delay_s=0.01) as server:
        url = server.url + "/v1/completions"
        first = asyncio.create_task(server.session.post(url, json=LONG))
        await until(lambda: running(server) == 1)
        async with aiohttp.ClientSession() as session:
            second = asyncio.create_task(session.post(url, json=LONG))
            await until(lambda: server.engine.stats().waiting == 1)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        await until(lambda: server.engine.stats().waiting == 0)
        assert running(server) == 1
        first.cancel()


async def test_many_come_and_go_and_nothing_is_left():
    async with kit(delay_s=0.002) as server:
        before = len(asyncio.all_tasks())

        async def visitor(i: int) -> None:
            async with aiohttp.ClientSession() as session:
                fields = {**LONG, "stream": bool(i % 2), "n": 1 + i % 3}
                timeout = aiohttp.ClientTimeout(total=0.02 + 0.01 * (i % 5))
                try:
                    url = server.url + "/v1/completions"
                    async with session.post(url, json=fields, timeout=timeout) as answer:
                        await answer.read()
                except TimeoutError:
                    pass

        await asyncio.gather(*(visitor(i) for i in range(40)))
        await server.quiet()
        await until(lambda: server.state.in_flight == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)


def deaf_socket(server: Kit) -> socket.socket:
    """A connection whose receiving side takes next to nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect((host, int(port)))
    return deaf


HELLO = [{"role": "user", "content": "hi"}]
BULKY = {**LONG, "messages": HELLO, "logprobs": True, "top_logprobs": 20, "n": 14, "stream": True}


def chat_bytes(fields: dict) -> bytes:
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


QUICK = ServerConfig(send_timeout_s=0.4)


async def hears_all(server: Kit) -> None:
    """Another stream goes on and is complete."""
    async with await server.post("/v1/completions", {**LONG, "stream": True}) as answer:
        *events, _ = await events_of(answer)
    text = "".join(json.loads(event.data)["choices"][0]["text"] for event in events)
    assert text == answer_to(token_ids("hello"), 3, 400, eos=False)[0]


async def test_an_event_stream_that_is_not_read_is_dropped():
    async with kit(QUICK) as server:
        with deaf_socket(server) as deaf:
            deaf.sendall(chat_bytes(BULKY))
            await until(lambda: running(server) > 0)
            await hears_all(server)
            await until(lambda: server.state.slow_readers.dropped == 1)
            await server.quiet()
            await until(lambda: server.state.in_flight == 0)


async def test_a_whole_answer_that_is_not_read_is_dropped():
    async with kit(QUICK) as server:
        with deaf_socket(server) as deaf:
            deaf.sendall(chat_bytes({**BULKY, "stream": False}))
            await until(lambda: server.state.slow_readers.dropped == 1)
            await server.quiet()
            await until(lambda: server.state.in_flight == 0)


async def test_a_websocket_that_is_not_read_is_dropped():
    async with kit(QUICK) as server:
        with deaf_socket(server) as deaf:
            deaf.sendall(
                b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            for lane in range(12):
                frame = {
                    **{"type": "response.create", "model": MODEL, "input": "hi"},
                    **{"stream_id": str(lane), "top_logprobs": 20, "ignore_eos": True},
                    "metadata": {"longer": "than a short frame"},
                }
                data = json.dumps(frame).encode()
                assert 126 <= len(data) < 65536
                deaf.sendall(b"\x81\xfe" + len(data).to_bytes(2) + bytes(4) + data)
            await until(lambda: running(server) > 0)
            await hears_all(server)
            await until(lambda: server.state.slow_readers.dropped == 1)
            await server.quiet()
            await until(lambda: server.state.metrics.sockets_open == 0)


async def test_slow_but_steady_readers_are_kept():
    async with kit(replace(QUICK, send_timeout_s=1.0)) as server:
        async with await server.post("/v1/chat/completions", {**BULKY, "n": 4}) as answer:
            size = 0
            async for piece in answer.content.iter_chunked(1 << 18):
                size += len(piece)
                await asyncio.sleep(0.02)
        assert size > 1 << 20
        assert server.state.slow_readers.dropped == 0


async def test_small_writes_are_not_held_back_by_the_kernel():
    async with kit(delay_s=0.01) as server:
        async with await server.post("/v1/completions", {**LONG, "stream": True}) as answer:
            await answer.content.readany()
            (gate,) = server.state.slow_readers._gates
            raw = gate.transport.get_extra_info("socket")
            assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            answer.close()
        await server.quiet()
