"""One HTTP exchange: reading a JSON body safely, answering JSON, answering a stream of events.

Knows aiohttp and the limits; knows no route.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from fastserve_jax.api import wire
from fastserve_jax.errors import BodyTooLarge, FastServeError, InvalidRequest, UnsupportedMedia
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.state import ServerState

STATE = web.AppKey("state", ServerState)
REQUEST_ID = web.RequestKey("request_id", str)
OWNER = web.RequestKey("owner", str)  # digest of the API key used, "" without keys


async def read_json[T](request: web.Request, kind: type[T]) -> T:
    """The body as `kind`. Raises UnsupportedMedia, BodyTooLarge or InvalidRequest."""
    if request.content_type != "application/json":
        raise UnsupportedMedia("send the body as JSON, with Content-Type: application/json")
    return wire.decode(await read_body(request, request.app[STATE].config), kind)


async def read_body(request: web.Request, config: ServerConfig) -> bytes:
    """Raises as read_json does."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise UnsupportedMedia("compressed bodies are not accepted: leave Content-Encoding out")
    if (request.content_length or 0) > config.max_body_bytes:
        raise BodyTooLarge(f"the body is larger than {config.max_body_bytes} bytes")
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await request.read()
    except TimeoutError:
        raise InvalidRequest("the body did not arrive in time", code="body_timeout") from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge(f"the body is larger than {config.max_body_bytes} bytes") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise InvalidRequest("the body is not well-formed HTTP") from None


def json_answer(value: object, status: int = 200) -> web.Response:
    return web.Response(
        body=wire.encode(value), status=status, content_type="application/json", charset="utf-8"
    )


def error_answer(error: FastServeError) -> web.Response:
    answer = json_answer(wire.error_answer(error), error.status)
    if error.retry_after_s is not None:
        answer.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


class EventStream:
    """A text/event-stream answer that begins with its first write, so that an error before it can
    still have a status. A reader that does not read loses its connection.

    Use as `async with`.
    """

    def __init__(self, request: web.Request) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client has gone")
        self._request = request
        self._watch = request.app[STATE].slow_readers
        self._gate = self._watch.enter(request.transport)
        self.answer = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )

    @property
    def begun(self) -> bool:
        return self.answer.prepared

    async def write(self, data: bytes) -> None:
        """Raises ConnectionResetError when the client has gone."""
        if not self.answer.prepared:
            await self.answer.prepare(self._request)
        with self._gate:
            await self.answer.write(data)

    async def end(self) -> web.StreamResponse:
        with self._gate:
            await self.answer.write_eof()
        return self.answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.leave(self._gate)


async def send_whole(request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
    """Write `answer` out here, watched, instead of leaving it to aiohttp."""
    if request.transport is None:
        return answer
    watch = request.app[STATE].slow_readers
    gate = watch.enter(request.transport)
    try:
        with gate:
            await answer.prepare(request)
            await answer.write_eof()
    finally:
        watch.leave(gate)
    return answer
