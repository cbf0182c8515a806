from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from fastserve_jax.server import websocket
from fastserve_jax.server.config import ServerConfig

from .kit import MODEL, Kit, answer_to, kit, token_ids
from .test_responses import ORDER

LAST = {"response.completed", "response.incomplete", "response.failed", "error"}


def frame(**fields: object) -> dict:
    plain = {"type": "response.create", "model": MODEL, "input": "hi", "max_output_tokens": 8}
    return {**plain, "seed": 3, "ignore_eos": True, **fields}


async def read(socket: aiohttp.ClientWebSocketResponse) -> list[dict]:
    """Events to the end of one response."""
    events = []
    while not events or events[-1]["type"] not in LAST:
        events.append(await socket.receive_json(timeout=10))
    return events


def connect(server: Kit, **options: object):
    return server.session.ws_connect(server.url + "/v1/responses", **options)


async def test_responses_one_after_the_other_and_continued_without_being_stored():
    async with kit() as server, connect(server) as socket:
        await socket.send_json(frame(store=False))
        first = await read(socket)
        assert [e["type"] for e in first if "delta" not in e["type"]] == [
            *ORDER,
            "response.incomplete",
        ]
        response = first[-1]["response"]
        text = response["output"][0]["content"][0]["text"]
        await socket.send_json(frame(input="more", previous_response_id=response["id"]))
        second = await read(socket)
        prompt = token_ids(f"user: hi\nassistant: {text}\nuser: more\nassistant: ")
        expected, _ = answer_to(prompt, 3, 8, eos=False)
        assert "".join(e.get("delta", "") for e in second) == expected
        assert all("stream_id" not in event for event in first + second)
        url = f"{server.url}/v1/responses/{response['id']}"
        assert (await server.session.get(url)).status == 404
    await asyncio.sleep(0)


async def test_lanes_run_side_by_side_and_name_every_event():
    async with kit(delay_s=0.01) as server, connect(server) as socket:
        await socket.send_json(frame(stream_id="long", max_output_tokens=40))
        await socket.send_json(frame(stream_id="short", max_output_tokens=4))
        ended: list[str] = []
        lanes: dict[str, list[int]] = {"long": [], "short": []}
        while len(ended) < 2:
            event = await socket.receive_json(timeout=10)
            lanes[event["stream_id"]].append(event["sequence_number"])
            if event["type"] in LAST:
                ended.append(event["stream_id"])
        assert ended == ["short", "long"]
        assert all(numbers == list(range(len(numbers))) for numbers in lanes.values())


async def test_one_lane_answers_in_the_order_asked():
    async with kit() as server, connect(server) as socket:
        for count in (5, 2, 3):
            await socket.send_json(frame(max_output_tokens=count))
        answers = [await read(socket) for _ in range(3)]
        spent = [events[-1]["response"]["usage"]["output_tokens"] for events in answers]
        assert spent == [5, 2, 3]


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("{", None),
        ("[]", None),
        ("[" * 50_000, None),
        (json.dumps({"type": "response.cancel", "model": MODEL, "input": "x"}), "type"),
        (json.dumps({"type": "response.create", "model": MODEL}), "input"),
        (json.dumps(frame(model="other")), "model"),
        (json.dumps(frame(temperature=9)), "temperature"),
        (json.dumps(frame(stream_id="a b")), "stream_id"),
        (json.dumps(frame(previous_response_id="resp_x")), "previous_response_id"),
    ],
)
async def test_a_bad_frame_is_answered_and_the_socket_goes_on(text, param):
    async with kit() as server, connect(server) as socket:
        await socket.send_str(text)
        error = await socket.receive_json(timeout=10)
        assert error["type"] == "error"
        assert error["status"] in (400, 404)
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert error["error"]["param"] == param
        await socket.send_bytes(b"\x00\xff")
        assert (await socket.receive_json(timeout=10))["type"] == "error"
        await socket.send_json(frame())
        assert (await read(socket))[-1]["type"] == "response.incomplete"


async def test_a_frame_too_long_closes_the_socket_and_nothing_else():
    async with kit(ServerConfig(max_body_bytes=1000)) as server:
        async with connect(server) as socket:
            await socket.send_str("x" * 2000)
            message = await socket.receive(timeout=10)
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        async with connect(server) as socket:
            await socket.send_json(frame())
            await read(socket)


async def test_lanes_and_their_queues_are_bounded(monkeypatch):
    monkeypatch.setattr(websocket, "MAX_WAITING", 2)
    config = ServerConfig(max_lanes=2)
    async with kit(config, delay_s=0.01) as server, connect(server) as socket:
        for i in range(4):
            await socket.send_json(frame(stream_id="a", max_output_tokens=100 + i))
        for lane in ("b", "c"):
            await socket.send_json(frame(stream_id=lane, max_output_tokens=100))
        refused = []
        while len(refused) < 2:
            event = await socket.receive_json(timeout=10)
            if event["type"] == "error":
                refused.append((event["stream_id"], event["status"]))
        assert sorted(refused) == [("a", 429), ("c", 429)]


async def test_sockets_are_bounded():
    async with kit(ServerConfig(max_sockets=1)) as server, connect(server):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await connect(server)
        assert caught.value.status == 503
        assert caught.value.headers["Retry-After"]


async def test_closing_the_socket_ends_its_generations():
    async with kit(delay_s=0.01) as server:
        async with connect(server) as socket:
            for lane in ("a", "b"):
                await socket.send_json(frame(stream_id=lane, max_output_tokens=400))
            await socket.receive_json(timeout=10)
            assert server.state.in_flight == 2
        await server.quiet()
        assert server.engine.stats().steps < 300
        async with asyncio.timeout(5):
            await server.state.idle()


async def test_losing_the_connection_ends_its_generations():
    async with kit(delay_s=0.01) as server:
        socket = await connect(server)
        await socket.send_json(frame(max_output_tokens=400))
        await socket.receive_json(timeout=10)
        socket._conn.transport.abort()
        await server.quiet()
        assert server.engine.stats().steps < 300
        await socket.close()


async def test_a_failing_response_reports_on_its_lane():
    async with kit(nan=[(1, 0), (2, 2)]) as server, connect(server) as socket:
        await socket.send_json(frame(stream_id="a"))
        (event,) = await read(socket)
        assert (event["type"], event["status"], event["stream_id"]) == ("error", 500, "a")
        await socket.send_json(frame(stream_id="a"))
        assert (await read(socket))[-1]["type"] == "response.failed"


async def test_draining_finishes_what_runs_then_says_goodbye():
    async with kit(delay_s=0.01) as server, connect(server) as socket:
        await socket.send_json(frame(max_output_tokens=20))
        await socket.receive_json(timeout=10)
        server.state.drain()
        await socket.send_json(frame(stream_id="late"))
        events = []
        while not events or events[-1]["type"] != "response.incomplete":
            events.append(await socket.receive_json(timeout=10))
        (late,) = [event for event in events if event["type"] == "error"]
        assert late["status"] == 503
        message = await socket.receive(timeout=10)
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)


async def test_a_plain_get_is_told_to_upgrade():
    async with kit() as server:
        answer = await server.session.get(server.url + "/v1/responses")
        assert answer.status == 426
        assert (await answer.json())["error"]["code"] == "upgrade_required"
