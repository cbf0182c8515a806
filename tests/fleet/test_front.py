"""The fleet's address before replicas that answer, refuse, die and lie: nothing that was accepted
is lost without a word, and nothing that was answered is asked again."""

import asyncio
import gzip
import io
import json
import random
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fastserve_jax.api import sse, wire
from fastserve_jax.api.response_events import Created
from fastserve_jax.api.responses import Response
from fastserve_jax.core.routing import Router
from fastserve_jax.fleet import front as module
from fastserve_jax.fleet.front import Front
from fastserve_jax.server.config import ServerConfig
from tests.fleet.kit import until

ENGINE_FAILED = {
    "error": {"message": "it stopped", "type": "server_error", "code": "engine_failed"}
}
LOADING = {"error": {"message": "loading", "type": "overloaded", "code": "server_overloaded"}}
BAD = {"error": {"message": "no such field", "type": "invalid_request_error", "code": None}}

CONFIG = ServerConfig(max_body_bytes=1 << 20)


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


async def test_what_is_said_goes_through_both_ways():
    async with fleet("answer") as (session, _, (replica,)):
        status, text = await ask(session, prompt="hello")
        assert (status, json.loads(text)) == (200, {"by": "r0"})
        ((method, path, body, headers),) = replica.seen
        assert (method, path) == ("POST", "/v1/completions?x=1")
        assert json.loads(body) == {"prompt": "hello"}
        assert headers["X-Own"] == "1"
        assert headers["Host"] == f"{session._base_url.host}:{session._base_url.port}"


@pytest.mark.parametrize(
    "how",
    [
        "die",
        "die in the body",
        "engine failed",
        "loading",
        "die before the first event",
        "end before the first event",
    ],
)
async def test_what_was_never_answered_is_asked_of_another(how):
    async with fleet(how, "answer") as (session, front, replicas):
        for _ in range(4):
            status, text = await ask(session, prompt="hello", stream="event" in how)
            assert (status, json.loads(text)) == (200, {"by": "r1"})
        assert replicas[0].asked == front.retried > 0
        assert replicas[1].asked == 4, "each once"
        assert not front.in_flight
        assert all(front.router.load(name) == 0 for name in front.peers)


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


async def test_an_event_in_its_middle_is_not_sent_on():
    async with fleet("die in an event") as (session, _, _):
        status, text = await ask(session, prompt="hello", stream=True)
        assert status == 200
        *events, last = [json.loads(e.removeprefix("data: ")) for e in text.strip().split("\n\n")]
        assert [event["n"] for event in events] == [0, 1]
        assert last["error"]["code"] == "replica_lost"


async def test_a_client_that_goes_is_no_fault_of_its_replica(monkeypatch):
    """Nor is its request asked again."""

    async def gone(request, response):
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    def app(front, made=Front.app):
        app = made(front)
        app.on_response_prepare.append(gone)
        return app

    monkeypatch.setattr(Front, "app", app)
    async with fleet("stream", "answer") as (session, front, replicas):
        for _ in replicas:
            with pytest.raises(aiohttp.ClientError):
                await ask(session, prompt="hello", stream=True)
        assert (front.cut_off, front.retried, front.in_flight) == (0, 0, 0)
        assert [replica.asked for replica in replicas] == [1, 1]


async def test_who_waits_for_a_replica_that_vanished_is_told():
    """Its node says nothing any more, not even that connections are closed."""
    async with fleet("vanish", "answer") as (session, front, replicas):
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await until(lambda: replicas[0].asked)
        front.remove("r0", is_lost=True)
        async with asyncio.timeout(5):
            assert json.loads((await waiting)[1]) == {"by": "r1"}
        assert front.retried == 1


async def test_a_stream_of_a_replica_that_vanished_ends_with_an_error():
    async with fleet("vanish in the middle") as (session, front, (replica,)):
        waiting = asyncio.create_task(ask(session, prompt="hello", stream=True))
        await until(lambda: replica.asked)
        await asyncio.sleep(0.05)
        front.remove("r0", is_lost=True)
        async with asyncio.timeout(5):
            assert "replica_lost" in (await waiting)[1]


async def test_a_websocket_of_a_replica_that_vanished_is_closed():
    async with fleet("vanish") as (session, front, _):
        async with session.ws_connect("/v1/responses") as socket:
            await socket.send_str("hello")
            await asyncio.sleep(0.05)
            front.remove("r0", is_lost=True)
            await socket.receive(timeout=5)
            assert socket.close_code == 1011
        assert front.cut_off == 1


async def test_a_replica_that_retires_finishes():
    async with fleet("stream slowly") as (session, front, (replica,)):
        waiting = asyncio.create_task(ask(session, prompt="hello", stream=True))
        await until(lambda: replica.asked)
        front.remove("r0", is_lost=False)
        replica.released.set()
        assert (await waiting)[1].endswith("data: [DONE]\n\n")


async def test_events_come_when_they_are_made():
    async with (
        fleet("stream slowly") as (session, front, (replica,)),
        session.post("/v1/chat/completions", json={"stream": True}) as answer,
    ):
        async with asyncio.timeout(5):
            first = await answer.content.readline()
        assert json.loads(first.removeprefix(b"data: "))["n"] == 0
        assert front.in_flight == 1
        replica.released.set()
        assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_client_that_goes_lets_its_replica_know():
    async with fleet("stream slowly") as (session, front, _):
        answer = await session.post("/v1/completions", json={"stream": True})
        await answer.content.readline()
        answer.close()
        await until(lambda: not front.in_flight)


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
        url = front.peers["r0"].url
        front.remove("r0", is_lost=False)
        async with session.get("/ready") as answer:
            assert answer.status == 503
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        front.add("r0", url)
        assert (await waiting)[0] == 200
        front.remove("r0", is_lost=False)
        monkeypatch.setattr(module, "WAIT_S", 0.1)
        status, text = await ask(session, prompt="hello")
        assert status == 503
        assert json.loads(text)["error"]["message"] == "no replica is ready: try again later"
        assert replica.asked == 1


async def test_a_request_whose_only_replica_died_waits_for_the_next():
    async with fleet("die", "answer") as (session, front, replicas):
        url = front.peers["r1"].url
        front.remove("r1", is_lost=False)
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await until(lambda: front.retried)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        front.remove("r0", is_lost=True)
        front.add("r2", url)
        assert json.loads((await waiting)[1]) == {"by": "r1"}
        assert [replica.asked for replica in replicas] == [1, 1]


async def test_a_fleet_that_stops_refuses_at_once():
    async with fleet("answer") as (session, front, (replica,)):
        url = front.peers["r0"].url
        front.remove("r0", is_lost=False)
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await asyncio.sleep(0.05)
        front.stop()
        for status, text in (await waiting, await ask(session, prompt="hello")):
            assert (status, json.loads(text)["error"]["code"]) == (503, "server_overloaded")
        front.add("r0", url)
        assert (await ask(session, prompt="hello"))[0] == 503
        async with session.get("/ready") as answer:
            assert answer.status == 503
        assert replica.asked == 0


async def test_those_that_wait_for_a_replica_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    async with fleet() as (session, front, _):
        first = asyncio.create_task(ask(session, prompt="hello"))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            assert (await ask(session, prompt="hello"))[0] == 503
        assert not first.done()
        front.stop()
        await first


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_looked_for_where_it_was_made(stream):
    async with fleet("answer", "answer", "answer") as (session, front, replicas):
        for _ in range(3):
            async with session.post("/v1/responses", json={"stream": stream}) as answer:
                assert "resp_" in await answer.text()
        for replica in replicas:
            (made,) = replica.kept
            for _ in range(2):
                async with session.get(f"/v1/responses/{made}") as answer:
                    assert (answer.status, (await answer.json())["by"]) == (200, replica.name)
            body = {"previous_response_id": made}
            async with session.post("/v1/responses", json=body) as answer:
                assert answer.status == 200
        assert not front.router.load("r0")
        made = replicas[1].kept[0]
        front.remove("r1", is_lost=True)
        async with session.get(f"/v1/responses/{made}") as answer:
            assert answer.status == 404, "as of any that is unknown"


async def test_a_response_whose_replica_is_busy_is_not_called_unknown():
    async with fleet("answer", "answer") as (session, _, replicas):
        async with session.post("/v1/responses", json={}) as answer:
            body = {"previous_response_id": (await answer.json())["id"]}
        replicas[0].how = "loading"
        async with session.post("/v1/responses", json=body) as answer:
            assert (answer.status, await answer.json()) == (503, LOADING)
        assert replicas[1].asked == 0


async def test_a_response_of_a_websocket_is_found():
    async with fleet("answer", "answer") as (session, _, replicas):
        async with session.ws_connect("/v1/responses") as socket:
            await socket.send_str("respond")
            await socket.receive_str()
        for _ in range(2):
            async with session.get(f"/v1/responses/{replicas[0].kept[0]}") as answer:
                assert answer.status == 200


async def test_responses_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_RESPONSES", 2)
    async with fleet("answer") as (session, front, _):
        for _ in range(4):
            async with session.post("/v1/responses", json={}) as answer:
                await answer.read()
        assert list(front._homes) == ["resp_r0x2", "resp_r0x3"]


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
            assert front.in_flight == 1
        assert [replica.asked for replica in replicas] == [1, 0]
        _, _, _, headers = replicas[0].seen[0]
        assert headers["Host"] == f"{session._base_url.host}:{session._base_url.port}"


async def test_a_websocket_that_is_refused_is_refused_in_the_same_status():
    async with fleet("refuse", "refuse") as (session, front, replicas):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect("/v1/responses")
        assert refused.value.status == 401
        assert refused.value.headers["WWW-Authenticate"] == "Bearer"
        assert [replica.asked for replica in replicas] == [1, 0]
        assert not front.retried


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


async def test_a_body_that_is_compressed_or_never_comes_is_refused():
    """Not a bomb for the front, nor a lie for a replica."""
    late = ServerConfig(body_timeout_s=0.1)
    async with fleet("answer", config=late) as (session, _, (replica,)):
        packed = gzip.compress(b'{"prompt": "hello"}')
        sent = {"data": packed, "headers": {"Content-Encoding": "gzip"}}
        async with session.post("/v1/completions", **sent) as answer:
            assert answer.status == 415

        async def never():
            yield b"{"
            await asyncio.sleep(5)

        async with session.post("/v1/completions", data=never()) as answer:
            assert (await answer.json())["error"]["code"] == "body_timeout"
        assert replica.asked == 0
