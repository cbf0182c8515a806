"""The fleet's address before replicas that answer, refuse, die and lie: nothing that was accepted
is lost without a word, and nothing that was answered is asked again."""

import asyncio
import io
import json
import random
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve_jax.core.routing import Router
from fastserve_jax.fleet import front as module
from fastserve_jax.fleet.front import Front

ENGINE_FAILED = {
    "error": {"message": "it stopped", "type": "server_error", "code": "engine_failed"}
}
LOADING = {"error": {"message": "loading", "type": "overloaded", "code": "server_overloaded"}}
BAD = {"error": {"message": "no such field", "type": "invalid_request_error", "code": None}}


class Replica:
    """Answers as `how` says; counts what it was asked."""

    def __init__(self, name, how="answer"):
        self.name, self.how, self.asked, self.seen = name, how, 0, []
        self.released = asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self.server = TestServer(app)

    async def _handle(self, request):
        self.asked += 1
        self.seen.append((request.method, request.path_qs, await request.read(), request.headers))
        if request.headers.get("Upgrade"):
            return await self._socket(request)
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
        if self.how == "fail at the first event":
            await response.write(b"data: " + json.dumps(ENGINE_FAILED).encode() + b"\n\n")
            return response
        for number in range(3):
            await response.write(f'data: {{"by": "{self.name}", "n": {number}}}\n\n'.encode())
            if self.how == "die in the middle" and number == 1:
                await asyncio.sleep(0.05)
                request.transport.abort()
                return response
            if self.how == "stream slowly":
                await self.released.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if self.how == "die":
                request.transport.abort()
                break
            await socket.send_str(f"{self.name}: {message.data}")
        return socket


@asynccontextmanager
async def fleet(*hows, policy="round-robin"):
    """-> a session at the front, the front, the replicas."""
    replicas = [Replica(f"r{number}", how) for number, how in enumerate(hows)]
    async with Front(Router(policy, random.sample), 1 << 20) as front:
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


async def test_what_is_said_goes_through_both_ways():
    async with fleet("answer") as (session, _, (replica,)):
        status, text = await ask(session, prompt="hello")
        assert (status, json.loads(text)) == (200, {"by": "r0"})
        ((method, path, body, headers),) = replica.seen
        assert (method, path) == ("POST", "/v1/completions?x=1")
        assert json.loads(body) == {"prompt": "hello"}
        assert headers["X-Own"] == "1"


@pytest.mark.parametrize(
    "how",
    [
        "die",
        "die in the body",
        "engine failed",
        "loading",
        "die before the first event",
        "end before the first event",
        "fail at the first event",
    ],
)
async def test_what_was_never_answered_is_asked_of_another(how):
    async with fleet(how, "answer") as (session, front, replicas):
        for _ in range(4):
            status, text = await ask(session, prompt="hello", stream="event" in how)
            assert (status, json.loads(text)) == (200, {"by": "r1"})
        assert replicas[0].asked == front.retried > 0
        assert replicas[1].asked == 4, "each once"
        assert not any(front.in_flight.values())
        assert all(front.router.load(name) == 0 for name in front.urls)


async def test_what_was_answered_is_not_asked_again():
    """Not even if the answer is that the request is wrong."""
    async with fleet("refuse", "answer") as (session, front, replicas):
        assert await ask(session, prompt="hello") == (400, json.dumps(BAD))
        assert [replica.asked for replica in replicas] == [1, 0]
        assert not front.retried


async def test_a_stream_that_had_begun_ends_with_an_error():
    async with fleet("die in the middle", "stream") as (session, front, replicas):
        status, text = await ask(session, prompt="hello", stream=True)
        assert status == 200
        *events, last = text.strip().split("\n\n")
        assert len(events) == 2
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "replica_lost"
        assert "r0 was lost in the middle" in error["message"]
        assert "[DONE]" not in text
        assert replicas[1].asked == 0
        assert front.cut_off == 1
        status, text = await ask(session, prompt="hello", stream=True)
        assert text.endswith("data: [DONE]\n\n")


async def test_events_come_when_they_are_made():
    async with (
        fleet("stream slowly") as (session, front, (replica,)),
        session.post("/v1/chat/completions", json={"stream": True}) as answer,
    ):
        async with asyncio.timeout(5):
            first = await answer.content.readline()
        assert json.loads(first.removeprefix(b"data: "))["n"] == 0
        assert front.in_flight == {"r0": 1}
        replica.released.set()
        assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_client_that_goes_lets_its_replica_know():
    async with fleet("stream slowly") as (session, front, _):
        answer = await session.post("/v1/completions", json={"stream": True})
        await answer.content.readline()
        answer.close()
        for _ in range(100):
            if not any(front.in_flight.values()):
                break
            await asyncio.sleep(0.02)
        assert front.in_flight == {"r0": 0}


async def test_where_all_refuse_the_client_hears_the_last():
    async with fleet("loading", "engine failed") as (session, front, replicas):
        status, text = await ask(session, prompt="hello")
        assert (status, json.loads(text)) in [(500, ENGINE_FAILED), (503, LOADING)]
        assert [replica.asked for replica in replicas] == [1, 1], "each once"
        assert front.refused == 1


async def test_tries_are_bounded():
    async with fleet(*["die"] * 6) as (session, _, replicas):
        status, text = await ask(session, prompt="hello")
        assert status == 503
        assert "did not answer" in text
        assert sum(replica.asked for replica in replicas) == module.MOST_TRIES


async def test_without_a_replica_a_request_waits_for_one_and_then_says_so(monkeypatch):
    async with fleet("answer") as (session, front, (replica,)):
        url = front.urls["r0"]
        front.remove("r0")
        async with session.get("/ready") as answer:
            assert answer.status == 503
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        front.add("r0", url)
        assert (await waiting)[0] == 200
        front.remove("r0")
        monkeypatch.setattr(module, "WAIT_S", 0.1)
        status, text = await ask(session, prompt="hello")
        assert status == 503
        assert json.loads(text)["error"]["message"] == "no replica is ready: try again later"
        assert replica.asked == 1


async def test_conversations_stay_where_they_began():
    async with fleet("answer", "answer", "answer", policy="prefix") as (session, _, replicas):
        turns = [{"role": "user", "content": "Tell me of the sea. " * 60}]
        for number in range(6):
            await ask(session, messages=turns, max_tokens=5)
            turns.append({"role": "user", "content": f"And of {number}? " * 30})
        assert sorted(replica.asked for replica in replicas) == [0, 0, 6]


async def test_a_websocket_is_joined_to_one_replica():
    async with fleet("answer", "answer") as (session, front, replicas):
        async with session.ws_connect("/v1/stream") as socket:
            for number in range(3):
                await socket.send_str(f"m{number}")
                assert await socket.receive_str() == f"r0: m{number}"
            assert front.in_flight == {"r0": 1}
        assert [replica.asked for replica in replicas] == [1, 0]


async def test_a_websocket_whose_replica_is_lost_is_closed_with_a_code():
    async with fleet("die") as (session, front, _):
        async with session.ws_connect("/v1/stream") as socket:
            await socket.send_str("hello")
            message = await socket.receive()
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            assert socket.close_code == 1011
        assert front.cut_off == 1


async def test_its_own_numbers_are_at_metrics():
    async with fleet("die", "answer") as (session, _, replicas):
        await ask(session, prompt="hello")
        async with session.get("/metrics") as answer:
            text = await answer.text()
        for line in (
            "fastserve:fleet_requests_total 1.0",
            "fastserve:fleet_retried_total 1.0",
            "fastserve:fleet_replicas 2.0",
            'fastserve:fleet_in_flight{replica="r1"} 0.0',
        ):
            assert line in text
        assert replicas[1].asked == 1, "a replica was asked for them"


async def test_a_body_that_is_too_large_is_refused_in_the_same_words():
    async with fleet("answer") as (session, _, (replica,)):
        body = io.BytesIO(json.dumps({"prompt": "x" * (2 << 20)}).encode())
        async with session.post("/v1/completions", data=body) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"
        assert replica.asked == 0
