"""GET /v1/responses as a WebSocket: response.create frames in, the events of responses out.

Frames with a stream_id run side by side, one response at a time on each lane; those without one
share a lane. Conversations made on the socket can be continued on it even when not stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import aclosing
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, WSMsgType, web
from msgspec import UNSET

from fastserve_jax.api import wire
from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.api.response_events import SocketError
from fastserve_jax.api.responses import SocketRequest
from fastserve_jax.errors import FastServeError, InvalidRequest, Overloaded, RateLimited
from fastserve_jax.server.exchange import OWNER, STATE
from fastserve_jax.server.response_job import response_job
from fastserve_jax.server.slow_readers import Gate
from fastserve_jax.server.state import ServerState

MAX_WAITING = 16  # frames that wait for their lane
KEPT_CONVERSATIONS = 64
HEARTBEAT_S = 30.0

_log = logging.getLogger(__name__)


async def connect(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    if request.headers.get("Upgrade", "").lower() != "websocket":
        fault = InvalidRequest("POST a response, or open a WebSocket here", code="upgrade_required")
        fault.status = 426
        raise fault
    _same_origin(request)
    state.models  # noqa: B018  (raises while no work is taken)
    if state.metrics.sockets_open >= state.config.max_sockets:
        raise Overloaded(f"all {state.config.max_sockets} WebSocket connections are in use")
    socket = web.WebSocketResponse(
        heartbeat=HEARTBEAT_S, max_msg_size=state.config.max_body_bytes, compress=False
    )
    await socket.prepare(request)
    if request.transport is None:
        return socket
    gate = state.slow_readers.enter(request.transport)
    try:
        with state.metrics.socket():
            await _Session(state, socket, gate, request[OWNER]).run()
    except* ConnectionError:
        pass  # the peer has gone, or was dropped for not reading
    finally:
        state.slow_readers.leave(gate)
    return socket


def _same_origin(request: web.Request) -> None:
    """Browsers let any page open a WebSocket to any host; only a page of this host may."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        fault = InvalidRequest("a page of another origin may not connect", code="invalid_origin")
        fault.status = 403
        raise fault


class _Session:
    """One connection. A lane exists while it has work."""

    def __init__(
        self, state: ServerState, socket: web.WebSocketResponse, gate: Gate, owner: str
    ) -> None:
        self._state = state
        self._socket = socket
        self._gate = gate
        self._owner = owner
        self._lanes: dict[str | None, deque[SocketRequest]] = {}
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._known: OrderedDict[str, Sequence[ChatTurn]] = OrderedDict()

    async def run(self) -> None:
        """Until the peer closes, or the server drains and the lanes are empty."""
        async with asyncio.TaskGroup() as tasks:
            running = {tasks.create_task(self._close_when_drained())}
            try:
                async for message in self._socket:
                    if message.type is not WSMsgType.TEXT:
                        await self._refuse(InvalidRequest("frames are JSON texts"), None)
                    elif (asked := await self._take(message.data)) is not None:
                        task = tasks.create_task(self._work(asked))
                        running.add(task)
                        task.add_done_callback(running.discard)
            finally:
                for task in running:
                    task.cancel()

    async def _close_when_drained(self) -> None:
        await self._state.draining.wait()
        await self._quiet.wait()
        await self._socket.close(code=WSCloseCode.GOING_AWAY, message=b"server shutting down")

    async def _take(self, frame: str) -> SocketRequest | None:
        """Read a frame. It is queued if its lane is busy, and given back if it opens one."""
        name = None
        try:
            asked = wire.decode(frame, SocketRequest)
            asked.check_lane()
            name = asked.stream_id
            waiting = self._lanes.get(name)
            if waiting is not None:
                if len(waiting) >= MAX_WAITING:
                    raise RateLimited(f"{MAX_WAITING} requests wait on this lane already")
                waiting.append(asked)
                return None
            if len(self._lanes) >= self._state.config.max_lanes:
                raise RateLimited(f"{self._state.config.max_lanes} lanes are busy already")
        except FastServeError as error:
            await self._refuse(error, name)
            return None
        self._lanes[name] = deque()
        self._quiet.clear()
        return asked

    async def _work(self, first: SocketRequest) -> None:
        name, asked = first.stream_id, first
        lane = self._lanes[name]
        try:
            while True:
                try:
                    with self._state.work():
                        await self._respond(asked)
                except FastServeError as error:
                    await self._refuse(error, name)
                except ConnectionError:
                    raise
                except Exception:
                    _log.exception("a WebSocket response failed")
                    await self._refuse(FastServeError("the server failed on this request"), name)
                if not lane:
                    return
                asked = lane.popleft()
        finally:
            del self._lanes[name]
            if not self._lanes:
                self._quiet.set()

    async def _respond(self, asked: SocketRequest) -> None:
        job = await response_job(self._state, asked, self._owner, local=self._known)
        async with aclosing(job.events(asked.stream_id)) as batches:
            async for batch in batches:
                for event in batch:
                    await self._send(wire.encode(event))
        if job.response.status != "failed":
            self._known[job.response.id] = job.conversation()
            if len(self._known) > KEPT_CONVERSATIONS:
                self._known.popitem(last=False)

    async def _refuse(self, error: FastServeError, lane: str | None) -> None:
        detail = wire.error_answer(error).error
        stream_id = UNSET if lane is None else lane
        await self._send(
            wire.encode(SocketError(status=error.status, error=detail, stream_id=stream_id))
        )

    async def _send(self, frame: bytes) -> None:
        with self._gate:
            await self._socket.send_frame(frame, WSMsgType.TEXT)
