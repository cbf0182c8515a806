"""The fleet's address: every request goes to one replica, and to another if it was never answered.

Never answered is what no byte has reached the client of: then a replica that is gone, or stops, or
cannot take it now, is passed over, and another asked. What had begun ends with an error that says
so, as a stream's own errors do. Knows addresses and HTTP, nothing of Ray.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from fastserve_jax.core.routing import Router

from .beginnings import BLOCK_TOKENS, beginnings
from .numbers import CONTENT_TYPE_LATEST, text_of

MOST_TRIES = 3
WAIT_S = 30.0  # for any replica to be there, before a client is told that there is none
_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "te"}
_PASSED_OVER = {"engine_failed", "server_overloaded"}  # errors of a replica, not of a request


class NotAnsweredError(Exception):
    """By this replica; another may. `answer` is what it said instead, if anything."""

    def __init__(self, why: str, answer: web.Response | None = None) -> None:
        super().__init__(why)
        self.answer = answer


class Front:
    """Use as `async with`. `urls` are those of replicas that are ready, by name."""

    def __init__(self, router: Router, most_body_bytes: int) -> None:
        self.router = router
        self.urls: dict[str, str] = {}
        self.in_flight: dict[str, int] = {}
        self.asked = self.retried = self.cut_off = self.refused = 0
        self._most_body_bytes = most_body_bytes
        self._changed = asyncio.Condition()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Front:
        timeout = aiohttp.ClientTimeout(total=None, connect=5)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=connector, auto_decompress=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def add(self, name: str, url: str) -> None:
        self.urls[name] = url
        self.router.add(name)
        task = asyncio.ensure_future(self._tell())
        task.add_done_callback(lambda _: None)

    def remove(self, name: str) -> None:
        self.urls.pop(name, None)
        self.router.remove(name)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._most_body_bytes)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        ready = bool(self.urls)
        return web.json_response({"replicas": len(self.urls)}, status=200 if ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=text_of(self), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            most = f"the body is larger than {self._most_body_bytes:,} bytes"
            return web.json_response(_error(most, "request_too_large"), status=413)
        self.asked += 1
        asked = beginnings(body)
        without: list[str] = []
        last = _refusal("no replica is ready: try again later")
        while len(without) < MOST_TRIES:
            name = self.router.route(asked.names, asked.tokens, BLOCK_TOKENS, without)
            if name is None:
                if without or not await self._some():
                    break
                continue
            try:
                async with self._counted(name, asked.tokens):
                    if request.headers.get("Upgrade", "").lower() == "websocket":
                        return await self._socket(request, name)
                    return await self._forward(request, name, body)
            except NotAnsweredError as error:
                last = error.answer or _refusal(f"{name} did not answer: {error}")
                without.append(name)
                self.retried += 1
        self.refused += 1
        return last

    async def _some(self) -> bool:
        """Waits until a replica is ready, for a while."""
        async with self._changed:
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._changed.wait_for(lambda: bool(self.urls))
            except TimeoutError:
                return False
        return True

    @asynccontextmanager
    async def _counted(self, name: str, tokens: float) -> AsyncIterator[None]:
        self.in_flight[name] = self.in_flight.get(name, 0) + 1
        try:
            yield
        finally:
            self.in_flight[name] -= 1
            self.router.ended(name, tokens)

    async def _forward(self, request: web.Request, name: str, body: bytes) -> web.StreamResponse:
        assert self._session is not None, "enter the front first"
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP}
        url = self.urls[name] + request.path_qs
        try:
            async with self._session.request(
                request.method, url, data=io.BytesIO(body), headers=headers, allow_redirects=False
            ) as answer:
                if answer.content_type != "text/event-stream":
                    return await _whole(answer)
                return await self._stream(request, answer, name)
        except (aiohttp.ClientError, OSError) as error:
            raise NotAnsweredError(str(error) or type(error).__name__) from error

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, name: str
    ) -> web.StreamResponse:
        first = await answer.content.readany()
        if not first:
            raise NotAnsweredError("its stream was empty")
        if _code(first.removeprefix(b"data:")) in _PASSED_OVER:
            raise NotAnsweredError("its engine has stopped")
        response = web.StreamResponse(status=answer.status, headers=_headers(answer))
        await response.prepare(request)
        await response.write(first)
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        except aiohttp.ClientError:
            self.cut_off += 1
            error = _error(
                f"{name} was lost in the middle of its answer: ask again", "replica_lost"
            )
            await response.write(b"data: " + json.dumps(error).encode() + b"\n\n")
        await response.write_eof()
        return response

    async def _socket(self, request: web.Request, name: str) -> web.WebSocketResponse:
        assert self._session is not None, "enter the front first"
        headers = {
            key: value
            for key, value in request.headers.items()
            if key.lower() not in _HOP and not key.lower().startswith("sec-websocket")
        }
        try:
            upstream = await self._session.ws_connect(
                self.urls[name] + request.path_qs, headers=headers, max_msg_size=0
            )
        except (aiohttp.ClientError, OSError) as error:
            raise NotAnsweredError(str(error) or type(error).__name__) from error
        async with upstream:
            downstream = web.WebSocketResponse(max_msg_size=self._most_body_bytes)
            await downstream.prepare(request)
            ways = {
                asyncio.create_task(_pump(upstream, downstream)),
                asyncio.create_task(_pump(downstream, upstream)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
            if not downstream.closed:
                code = upstream.close_code or aiohttp.WSCloseCode.INTERNAL_ERROR
                self.cut_off += upstream.close_code in (None, 1006)
                await downstream.close(code=1011 if code == 1006 else code)
        return downstream


async def _pump(source: Any, target: Any) -> None:
    async for message in source:
        if message.type is aiohttp.WSMsgType.TEXT:
            await target.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await target.send_bytes(message.data)


async def _whole(answer: aiohttp.ClientResponse) -> web.Response:
    body = await answer.read()
    response = web.Response(status=answer.status, body=body, headers=_headers(answer))
    if answer.status >= 500 and _code(body) in _PASSED_OVER:
        raise NotAnsweredError(f"it said {answer.status}", response)
    return response


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {key: value for key, value in answer.headers.items() if key.lower() not in _HOP}


def _code(body: bytes) -> str | None:
    """Of an error in JSON."""
    if b'"error"' not in body[:20]:
        return None
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _refusal(message: str) -> web.Response:
    error = _error(message, "server_overloaded")
    return web.json_response(error, status=503, headers={"Retry-After": "5"})
