"""One request to one replica, and its answer to the client: whole, as events, or as a WebSocket.

Never answered is what no byte has reached the client of; what had begun ends with an error that
says so, as a stream's own errors do. Only the replica's faults count as its own: a client that goes
away ends its request, and nothing else. Knows no other replica.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, Self

import aiohttp
from aiohttp import web

from fastserve_jax.api import sse, wire
from fastserve_jax.errors import FastServeError, InvalidRequest, Unauthorized
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.exchange import error_answer
from fastserve_jax.server.slow_readers import Gate, SlowReaders
from fastserve_jax.server.websocket import HEARTBEAT_S

from .peer import NotAnsweredError, Peer

_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te"}
_PASSED_OVER = {"engine_failed", "server_overloaded"}  # errors of a replica, not of a request
_RESPONSE = re.compile(rb'"id":"(resp_\w+)"')
_CREATED = '{"type":"response.created"'  # the first event of one, which has its id
RESPONSES = "/v1/responses"


class Relay:
    """Use as `async with`. `made` hears the id of every response, and the name of who has it."""

    _session: aiohttp.ClientSession

    def __init__(self, config: ServerConfig, made: Callable[[str, str], None]) -> None:
        self.cut_off = 0
        self._most_body_bytes = config.max_body_bytes
        self._made = made
        self._slow_readers = SlowReaders(config.send_timeout_s)

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, connect=5)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=connector, auto_decompress=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def exchange(self, request: web.Request, peer: Peer, body: bytes) -> web.StreamResponse:
        """Raises NotAnsweredError."""
        url = peer.url + request.path_qs
        headers = _headers(request.headers)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._socket(request, peer, url, headers)
        async with peer.awaited():
            answer = await self._session.request(
                request.method, url, data=io.BytesIO(body), headers=headers, allow_redirects=False
            )
        async with answer:
            if answer.content_type == "text/event-stream":
                return await self._events(request, peer, answer)
            async with peer.awaited():
                whole = await answer.read()
        response = web.Response(status=answer.status, body=whole, headers=_headers(answer.headers))
        if answer.status >= 500 and _code(whole) in _PASSED_OVER:
            raise NotAnsweredError(f"it said {answer.status}", response)
        self._remember(request, peer, whole)
        with self._watched(request) as gate, gate:
            await response.prepare(request)
            await response.write_eof()
        return response

    async def _events(
        self, request: web.Request, peer: Peer, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=_headers(answer.headers))
        with self._watched(request) as gate:
            try:
                async with aclosing(_whole_events(answer, peer)) as pieces:
                    async for events in pieces:
                        with gate:
                            if not response.prepared:
                                self._remember(request, peer, events)
                                await response.prepare(request)
                            await response.write(events)
            except NotAnsweredError:
                if not response.prepared:
                    raise
                self.cut_off += 1
                why = f"{peer.name} was lost in the middle of its answer: ask again"
                lost = FastServeError(why, code="replica_lost")
                with gate:
                    await response.write(sse.frame(wire.encode(wire.error_answer(lost))))
            if not response.prepared:
                raise NotAnsweredError("its stream was empty")
            with gate:
                await response.write_eof()
        return response

    @contextmanager
    def _watched(self, request: web.Request) -> Iterator[Gate]:
        """For writes to a client, which may not read them."""
        if request.transport is None:
            raise ConnectionResetError("the client has gone")
        gate = self._slow_readers.enter(request.transport)
        try:
            yield gate
        finally:
            self._slow_readers.leave(gate)

    async def _socket(
        self, request: web.Request, peer: Peer, url: str, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        def hear(event: str) -> None:
            if event.startswith(_CREATED):
                self._remember(request, peer, event.encode())

        own = {k: v for k, v in headers.items() if not k.lower().startswith("sec-websocket")}
        async with peer.awaited():
            try:
                upstream = await self._session.ws_connect(url, headers=own, max_msg_size=0)
            except aiohttp.WSServerHandshakeError as refused:
                if refused.status >= 500:
                    raise
                return error_answer(_refused(refused.status))
        async with upstream:
            downstream = web.WebSocketResponse(
                heartbeat=HEARTBEAT_S, max_msg_size=self._most_body_bytes
            )
            await downstream.prepare(request)
            ways = {
                asyncio.create_task(_pump(upstream, downstream, hear)),
                asyncio.create_task(_pump(downstream, upstream)),
            }
            try:
                async with peer.awaited():
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            except NotAnsweredError:
                pass  # and so its close code is none
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            if not downstream.closed:
                code = upstream.close_code or aiohttp.WSCloseCode.INTERNAL_ERROR
                self.cut_off += upstream.close_code in (None, 1006)
                await downstream.close(code=1011 if code == 1006 else code)
        return downstream

    def _remember(self, request: web.Request, peer: Peer, answer: bytes) -> None:
        if request.path == RESPONSES and (found := _RESPONSE.search(answer)):
            self._made(found[1].decode(), peer.name)


async def _pump(source: Any, target: Any, hear: Callable[[str], None] = lambda _: None) -> None:
    async for message in source:
        if message.type is aiohttp.WSMsgType.TEXT:
            hear(message.data)
            await target.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await target.send_bytes(message.data)


async def _whole_events(answer: aiohttp.ClientResponse, peer: Peer) -> AsyncGenerator[bytes]:
    """As they come, none in parts: so that an error can follow any of them."""
    pending = b""
    while True:
        async with peer.awaited():
            piece = await answer.content.readany()
        if not piece:
            break
        whole, blank, pending = (pending + piece).rpartition(b"\n\n")
        if blank:
            yield whole + blank
    if pending:
        yield pending


def _headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in _HOP}


def _refused(status: int) -> FastServeError:
    """A WebSocket, in a replica's status: of what else it says, nothing is to be had."""
    kind = Unauthorized if status == Unauthorized.status else InvalidRequest
    error = kind(f"the WebSocket was refused with status {status}")
    error.status = status
    return error


def _code(body: bytes) -> str | None:
    """Of an error in JSON."""
    if b'"error"' not in body[:20]:
        return None
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
