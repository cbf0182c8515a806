"""An async client for a running server, typed by the wire types. Knows no engine and no model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from fastserve_jax.api import sse, wire
from fastserve_jax.api.chat import ChatChunk, ChatCompletion, ChatMessage, ChatRequest
from fastserve_jax.api.completions import Completion, CompletionRequest
from fastserve_jax.api.models import (
    DetokenizeAnswer,
    DetokenizeRequest,
    Loading,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
    Unloaded,
    Unloading,
)
from fastserve_jax.api.response_events import AnyEvent, Completed, Failed, Incomplete, SocketError
from fastserve_jax.api.responses import Response, ResponseRequest, SocketRequest
from fastserve_jax.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EngineFailed,
    FastServeError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
    UnsupportedMedia,
)

RETRIED = frozenset({429, 502, 503})
LONGEST_WAIT_S = 60.0  # a server that asks for more is believed, and not waited for
LANE_EVENTS = 1024  # unread events of one lane before the socket stops reading
_BY_CODE: dict[str | None, type[FastServeError]] = {
    kind.code: kind
    for kind in (
        *(ModelNotFound, Unauthorized, BodyTooLarge, UnsupportedMedia),
        *(RateLimited, Overloaded, DeadlineExceeded, EngineFailed),
    )
}

Message = ChatMessage | dict[str, Any]


def error_from(
    status: int, detail: wire.ErrorDetail, retry_after_s: float | None = None
) -> FastServeError:
    """The server's error as the same class it was there."""
    kind = _BY_CODE.get(detail.code)
    if kind is None:
        busy = Overloaded if status in RETRIED else FastServeError
        kind = InvalidRequest if 400 <= status < 500 and status != 429 else busy
    error = kind(detail.message, param=detail.param)
    error.code, error.type, error.status = detail.code, detail.type, status
    error.retry_after_s = retry_after_s
    return error


class AsyncClient:
    """Use as `async with`. Keyword fields are those of the request types in `fastserve_jax.api`;
    `model` left out means the one that the server has.

    Methods raise the errors of `fastserve_jax.errors` that the server raised. A server that is
    busy or away is asked again up to `max_retries` times, never once tokens have arrived.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        max_retries: int = 2,
        timeout_s: float | None = 600.0,
        connect_timeout_s: float = 5.0,
        backoff_s: float = 0.5,
    ) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._max_retries = max_retries
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
        self._backoff_s = backoff_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None, "AsyncClient is used as `async with`"
        await self._session.close()

    async def models(self) -> list[ModelCard]:
        return (await self._call("GET", "/v1/models", None, ModelList)).data

    async def load_model(self, model: str, *, name: str | None = None) -> ModelCard:
        """Returns when it is served, by `name`, or by its own; one that had the name finishes what
        it has. The server must have been started with server.loading."""
        asked = Loading(model=model, name=name)
        return await self._call("POST", "/models/load", asked, ModelCard)

    async def unload_model(self, name: str) -> None:
        """It has no new requests from now on."""
        await self._call("POST", "/models/unload", Unloading(model=name), Unloaded)

    async def complete(
        self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any
    ) -> Completion:
        asked = _completion(prompt, model, fields)
        return await self._call("POST", "/v1/completions", asked, Completion)

    async def chat(
        self, messages: Sequence[Message], *, model: str | None = None, **fields: Any
    ) -> ChatCompletion:
        asked = _chat(messages, model, fields)
        return await self._call("POST", "/v1/chat/completions", asked, ChatCompletion)

    async def respond(
        self, input: str | list[Any], *, model: str | None = None, **fields: Any
    ) -> Response:
        asked = ResponseRequest(model=model, input=input, **fields)
        return await self._call("POST", "/v1/responses", asked, Response)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenizeAnswer:
        asked = TokenizeRequest(prompt=text, add_special_tokens=add_special_tokens)
        return await self._call("POST", "/tokenize", asked, TokenizeAnswer)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        asked = DetokenizeRequest(tokens=list(tokens))
        return (await self._call("POST", "/detokenize", asked, DetokenizeAnswer)).prompt

    @asynccontextmanager
    async def stream_complete(
        self, prompt: str | Sequence[int], *, model: str | None = None, **fields: Any
    ) -> AsyncIterator[AsyncIterator[Completion]]:
        """Chunks as they come. Leaving the block early ends the generation on the server."""
        asked = _completion(prompt, model, {**fields, "stream": True})
        async with self._open("POST", "/v1/completions", asked) as answer:
            yield _chunks(answer, Completion)

    @asynccontextmanager
    async def stream_chat(
        self, messages: Sequence[Message], *, model: str | None = None, **fields: Any
    ) -> AsyncIterator[AsyncIterator[ChatChunk]]:
        """Chunks as they come. Leaving the block early ends the generation on the server."""
        asked = _chat(messages, model, {**fields, "stream": True})
        async with self._open("POST", "/v1/chat/completions", asked) as answer:
            yield _chunks(answer, ChatChunk)

    @asynccontextmanager
    async def websocket(self) -> AsyncIterator[ResponseSocket]:
        """A connection for many responses, one after the other or side by side."""
        assert self._session is not None, "AsyncClient is used as `async with`"
        try:
            connection = await self._session.ws_connect(self._base_url + "/v1/responses")
        except aiohttp.WSServerHandshakeError as error:
            code = Unauthorized.code if error.status == Unauthorized.status else None
            detail = wire.ErrorDetail("the WebSocket was refused", "server_error", code=code)
            raise error_from(error.status, detail) from error
        except aiohttp.ClientError as error:
            raise _unreachable(self._base_url, error) from error
        socket = ResponseSocket(connection)
        try:
            yield socket
        finally:
            await socket.close()

    async def _call[T](self, method: str, path: str, body: object, kind: type[T]) -> T:
        async with self._open(method, path, body) as answer:
            return msgspec.json.decode(await answer.read(), type=kind)

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: object
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A good answer's headers have come; its body is the caller's to read."""
        assert self._session is not None, "AsyncClient is used as `async with`"
        data = None if body is None else wire.encode(body)
        headers = {"Content-Type": "application/json"}
        for attempt in range(self._max_retries + 1):
            try:
                answer = await self._session.request(
                    method, self._base_url + path, data=data, headers=headers
                )
            except aiohttp.ClientError as error:
                if attempt == self._max_retries:
                    raise _unreachable(self._base_url, error) from error
                await asyncio.sleep(self._pause_s(attempt, None))
                continue
            except TimeoutError as error:
                raise DeadlineExceeded("the server did not answer in time") from error
            async with answer:
                if answer.status < 400:
                    yield answer
                    return
                failure = await _failure(answer)
            asked_s = failure.retry_after_s
            too_long = asked_s is not None and asked_s > LONGEST_WAIT_S
            if answer.status not in RETRIED or too_long or attempt == self._max_retries:
                raise failure
            await asyncio.sleep(self._pause_s(attempt, asked_s))

    def _pause_s(self, attempt: int, asked_s: float | None) -> float:
        backoff_s = min(self._backoff_s * 2.0**attempt, 8.0)
        return max(backoff_s * random.uniform(0.75, 1.0), asked_s or 0.0)


def _completion(
    prompt: str | Sequence[int], model: str | None, fields: dict[str, Any]
) -> CompletionRequest:
    given: str | list[str | int | list[int]] = prompt if isinstance(prompt, str) else list(prompt)
    return CompletionRequest(model=model, prompt=given, **fields)


def _chat(messages: Sequence[Message], model: str | None, fields: dict[str, Any]) -> ChatRequest:
    typed = [m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in messages]
    return ChatRequest(model=model, messages=typed, **fields)


def _unreachable(url: str, error: Exception) -> FastServeError:
    return FastServeError(f"no server answers at {url}: {error}", code="unreachable")


async def _failure(answer: aiohttp.ClientResponse) -> FastServeError:
    try:
        detail = msgspec.json.decode(await answer.read(), type=wire.ErrorAnswer).error
    except msgspec.DecodeError:
        detail = wire.ErrorDetail(f"HTTP {answer.status} {answer.reason}", "server_error")
    after = answer.headers.get("Retry-After", "")
    return error_from(answer.status, detail, float(after) if after.isdigit() else None)


async def _chunks[T](answer: aiohttp.ClientResponse, kind: type[T]) -> AsyncIterator[T]:
    """Raises what the server reports in mid-stream, EngineFailed when the stream is cut off."""
    parser = sse.EventParser()
    complete = False
    try:
        async for piece in answer.content.iter_any():
            for event in parser.push(piece):
                if event.data == "[DONE]":
                    complete = True
                elif event.data.startswith('{"error"'):
                    detail = msgspec.json.decode(event.data, type=wire.ErrorAnswer).error
                    raise error_from(500, detail)
                else:
                    yield msgspec.json.decode(event.data, type=kind)
    except aiohttp.ClientError as error:
        raise EngineFailed("the connection was lost in mid-stream") from error
    except TimeoutError as error:
        raise DeadlineExceeded("the stream did not end in time") from error
    if not complete:
        raise EngineFailed("the stream ended before it was complete")


class ResponseSocket:
    """Responses over one WebSocket. Each call of `respond` is a lane of its own."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._connection = connection
        self._lanes: dict[str, asyncio.Queue[AnyEvent | FastServeError]] = {}
        self._count = 0
        self._lost: FastServeError | None = None
        self._reader = asyncio.create_task(self._read())

    async def respond(
        self, input: str | list[Any], *, model: str | None = None, **fields: Any
    ) -> AsyncIterator[AnyEvent]:
        """The events of one response, the last one whole. `previous_response_id` continues a
        response of this socket. An iterator left early is skipped, not stopped."""
        if self._lost is not None:
            raise self._lost
        self._count += 1
        lane = f"lane-{self._count}"
        asked = SocketRequest(
            type="response.create",
            stream_id=lane,
            model=model,
            input=input,
            **fields,
        )
        queue = self._lanes[lane] = asyncio.Queue(LANE_EVENTS)
        try:
            await self._connection.send_str(wire.encode(asked).decode())
            while True:
                event = await queue.get()
                if isinstance(event, FastServeError):
                    raise event
                yield event
                if isinstance(event, Completed | Incomplete | Failed):
                    return
        finally:
            del self._lanes[lane]

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._connection.close()

    async def _read(self) -> None:
        why = "the WebSocket has closed"
        try:
            async for message in self._connection:
                event = msgspec.json.decode(message.data, type=AnyEvent | SocketError)
                queue = self._lanes.get(event.stream_id or "")
                if queue is None:
                    continue
                if isinstance(event, SocketError):
                    await queue.put(error_from(event.status, event.error))
                else:
                    await queue.put(event)
        except msgspec.DecodeError as error:
            why = f"the server sent what is no event: {error}"
        finally:
            self._lost = EngineFailed(why)
            for queue in self._lanes.values():
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(self._lost)
