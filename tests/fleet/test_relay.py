"""One exchange through the fleet's address: whole events, both ways of a WebSocket, and whose fault
it is that it ends."""

import asyncio
import gzip
import io
import json

import aiohttp
import pytest

from fastserve_jax.fleet.front import Front
from fastserve_jax.server.config import ServerConfig
from tests.fleet.kit import ask, fleet, until


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


async def test_what_is_said_goes_through_both_ways():
    async with fleet("answer") as (session, _, (replica,)):
        status, text = await ask(session, prompt="hello")
        assert (status, json.loads(text)) == (200, {"by": "r0"})
        ((method, path, body, headers),) = replica.seen
        assert (method, path) == ("POST", "/v1/completions?x=1")
        assert json.loads(body) == {"prompt": "hello"}
        assert headers["X-Own"] == "1"
        assert headers["Host"] == f"{session._base_url.host}:{session._base_url.port}"


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
