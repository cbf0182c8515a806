"""What tests of a fleet share: replicas that answer, refuse, die and lie, and a front before."""

import asyncio
import json
import random
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve_jax.api import sse, wire
from fastserve_jax.api.response_events import Created
from fastserve_jax.api.responses import Response
from fastserve_jax.core.routing import Router
from fastserve_jax.fleet.front import Front
from fastserve_jax.server.config import ServerConfig

ENGINE_FAILED = {
    "error": {"message": "it stopped", "type": "server_error", "code": "engine_failed"}
}
LOADING = {"error": {"message": "loading", "type": "overloaded", "code": "server_overloaded"}}
BAD = {"error": {"message": "no such field", "type": "invalid_request_error", "code": None}}

CONFIG = ServerConfig(max_body_bytes=1 << 20)


async def until(happens):
    async with asyncio.timeout(5):
        while not happens():  # noqa: ASYNC110  there is nobody to say so
            await asyncio.sleep(0.001)


class Replica:
    """Answers as `how` says; counts what it was asked."""

    def __init__(self, name, how="answer"):
        self.name, self.how, self.asked, self.seen = name, how, 0, []
        self.released = asyncio.Event()
        self.kept = []  # ids of responses
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self.server = TestServer(app)

    async def _handle(self, request):
        self.asked += 1
        self.seen.append((request.method, request.path_qs, await request.read(), request.headers))
        if request.headers.get("Upgrade"):
            return await self._socket(request)
        if request.path.startswith("/v1/responses"):
            return await self._response(request)
        match self.how:
            case "answer":
                return web.json_response({"by": self.name})
            case "die":
                request.transport.abort()
                return web.Response()
            case "die in the body":
                response = web.Response(body=b"x" * 100, headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b"x" * 100)
                request.transport.abort()
                return response
            case "engine failed":
                return web.json_response(ENGINE_FAILED, status=500)
            case "loading":
                return web.json_response(LOADING, status=503, headers={"Retry-After": "5"})
            case "vanish":
                await self.released.wait()
                return web.Response()
            case "refuse":
                return web.json_response(BAD, status=400)
        return await self._stream(request)

    async def _stream(self, request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.how == "end before the first event":
            return response
        if self.how == "die before the first event":
            request.transport.abort()
            return response
        for number in range(3):
            await response.write(f'data: {{"by": "{self.name}", "n": {number}}}\n\n'.encode())
            if self.how == "die in the middle" and number == 1:
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            if self.how == "die in an event" and number == 1:
                await response.write(b'data: {"by": "')
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            if self.how in ("stream slowly", "vanish in the middle"):
                await self.released.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _response(self, request):
        """As the server does: an id is known where it was made."""
        if request.method == "POST":
            asked = json.loads(self.seen[-1][2])
            if asked.get("previous_response_id") not in (None, *self.kept):
                return web.json_response(BAD, status=400)
            if self.how == "loading":
                return web.json_response(LOADING, status=503)
            if not asked.get("stream"):
                whole = wire.encode(self._made())
                return web.Response(body=whole, content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            event = wire.encode(Created(response=self._made()))
            await response.write(sse.frame(event, "response.created"))
            return response
        known = request.path.rpartition("/")[2] in self.kept
        return web.json_response({"by": self.name}, status=200 if known else 404)

    def _made(self):
        self.kept.append(f"resp_{self.name}x{len(self.kept)}")
        other = {"metadata": {"id": "resp_other"}, "previous_response_id": "resp_other"}
        own = {"id": self.kept[-1], "created_at": 0, "status": "completed", "model": "m"}
        return Response(**own, **other, output=[], temperature=1.0, top_p=1.0)

    async def _socket(self, request):
        if self.how == "refuse":
            return web.json_response(BAD, status=401)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if self.how == "die":
                request.transport.abort()
                break
            if self.how == "vanish":
                await self.released.wait()
            if message.data == "respond":
                await socket.send_str(wire.encode(Created(response=self._made())).decode())
                continue
            await socket.send_str(f"{self.name}: {message.data}")
        return socket


@asynccontextmanager
async def fleet(*hows, policy="round-robin", config=CONFIG):
    """-> a session at the front, the front, the replicas."""
    replicas = [Replica(f"r{number}", how) for number, how in enumerate(hows)]
    async with Front(Router(policy, random.sample), config) as front:
        for replica in replicas:
            await replica.server.start_server()
            front.add(replica.name, str(replica.server.make_url("")).rstrip("/"))
        async with (
            TestServer(front.app()) as server,
            aiohttp.ClientSession(str(server.make_url("/"))) as session,
        ):
            yield session, front, replicas
        for replica in replicas:
            replica.released.set()
            await replica.server.close()


async def ask(session, **body):
    async with session.post("/v1/completions?x=1", json=body, headers={"X-Own": "1"}) as answer:
        return answer.status, await answer.text()
