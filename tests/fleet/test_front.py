"""The fleet's address before replicas that answer, refuse, die and lie: nothing that was accepted
is lost without a word, and nothing that was answered is asked again."""

import asyncio
import json

import pytest

from fastserve_jax.fleet import front as module
from tests.fleet.kit import BAD, ENGINE_FAILED, LOADING, ask, fleet, until


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


async def test_who_waits_for_a_replica_that_vanished_is_told():
    """Its node says nothing any more, not even that connections are closed."""
    async with fleet("vanish", "answer") as (session, front, replicas):
        waiting = asyncio.create_task(ask(session, prompt="hello"))
        await until(lambda: replicas[0].asked)
        front.remove("r0", is_lost=True)
        async with asyncio.timeout(5):
            assert json.loads((await waiting)[1]) == {"by": "r1"}
        assert front.retried == 1


async def test_a_replica_that_retires_finishes():
    async with fleet("stream slowly") as (session, front, (replica,)):
        waiting = asyncio.create_task(ask(session, prompt="hello", stream=True))
        await until(lambda: replica.asked)
        front.remove("r0", is_lost=False)
        replica.released.set()
        assert (await waiting)[1].endswith("data: [DONE]\n\n")


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
