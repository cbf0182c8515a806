from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import aiohttp
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.lifecycle import drain, listening, serve
from fastserve_jax.server.state import Phase, ServerState

from .kit import LIMITS, MODEL, answer_to, kit, token_ids
from .test_disconnect import running, until

ASKED = {"model": MODEL, "prompt": "hello", "max_tokens": 30, "ignore_eos": True, "seed": 3}


async def test_it_is_live_before_it_is_ready():
    async with kit(ready=False) as server:
        assert (await server.session.get(server.url + "/health")).status == 200
        ready = await server.session.get(server.url + "/ready")
        assert (ready.status, bool(ready.headers["Retry-After"])) == (503, True)
        for path in ("/v1/completions", "/models/load"):
            async with await server.post(path, ASKED) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"]
                assert "loading" in (await answer.json())["error"]["message"]
        assert server.state.metrics.rejected["loading"] == 2  # probes are not rejections


async def test_a_full_queue_says_when_to_come_again():
    limits = replace(LIMITS, max_slots=1, max_queue=1)
    async with kit(limits=limits, delay_s=0.01) as server:
        first = asyncio.create_task(server.post("/v1/completions", ASKED))
        await until(lambda: running(server) == 1)
        second = asyncio.create_task(server.post("/v1/completions", ASKED))
        await until(lambda: server.engine.stats().waiting == 1)
        for path, body in (
            ("/v1/completions", {**ASKED, "stream": True}),
            ("/v1/completions", {**ASKED, "n": 4}),
            ("/v1/responses", {"model": MODEL, "input": "x", "stream": True}),
        ):
            async with await server.post(path, body) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"]
                assert (await answer.json())["error"]["code"] == "server_overloaded"
        assert [(await task).status for task in (first, second)] == [200, 200]
        assert server.state.metrics.rejected["queue_full"] == 3
        await server.quiet()


@pytest.mark.parametrize("headers", [{}, {"Upgrade": "websocket"}])
async def test_draining_refuses_new_work_and_finishes_the_old(headers):
    async with kit(delay_s=0.01) as server:
        asking = server.post("/v1/completions", ASKED, headers=headers)
        working = asyncio.create_task(asking)
        await until(lambda: running(server) == 1)
        assert server.state.in_flight == 1
        drained = asyncio.create_task(drain(server.state))
        await asyncio.sleep(0)
        assert (await server.session.get(server.url + "/health")).status == 200
        assert (await server.session.get(server.url + "/ready")).status == 503
        async with await server.post("/v1/completions", ASKED) as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"]
            assert answer.headers["Connection"] == "close"
        async with await working as answer:
            text = (await answer.json())["choices"][0]["text"]
        assert text == answer_to(token_ids("hello"), 3, 30, eos=False)[0]
        assert await drained is True


async def test_draining_has_an_end():
    config = ServerConfig(drain_timeout_s=0.05)
    async with kit(config, delay_s=0.02) as server:
        working = asyncio.create_task(
            server.session.post(server.url + "/v1/completions", json={**ASKED, "max_tokens": 400})
        )
        await until(lambda: running(server) == 1)
        assert await drain(server.state) is False
        working.cancel()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_closes(kind):
    async with kit(delay_s=0.01) as server:
        state = ServerState(ServerConfig(port=0), Metrics(MODEL))
        state.put(server.state.model(None))
        state.ready()
        urls: list[str] = []
        serving = asyncio.create_task(serve(state, urls.append))
        await until(lambda: bool(urls))
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(session.post(urls[0] + "/v1/completions", json=ASKED))
            await until(lambda: running(server) == 1)
            os.kill(os.getpid(), kind)
            await until(lambda: state.phase is Phase.DRAINING)
            async with asking.result() if asking.done() else await asking as answer:
                assert (await answer.json())["usage"]["completion_tokens"] == 30
        assert await asyncio.wait_for(serving, 10) is True
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as session:
                await session.get(urls[0] + "/health")


async def test_stopping_cuts_what_does_not_end():
    config = ServerConfig(port=0, drain_timeout_s=0.05)
    async with kit(delay_s=0.02) as server:
        state = ServerState(config, Metrics(MODEL))
        state.put(server.state.model(None))
        state.ready()
        async with listening(state) as url, aiohttp.ClientSession() as session:
            body = {**ASKED, "max_tokens": 400, "stream": True}
            answer = await session.post(url + "/v1/completions", json=body)
            assert await drain(state) is False
        await server.quiet()
        answer.close()


async def test_a_taken_port_is_the_operators_to_mend():
    async with kit() as server:
        port = int(server.url.rpartition(":")[2])
        state = ServerState(ServerConfig(port=port), Metrics(MODEL))
        with pytest.raises(ConfigError, match=str(port)):
            async with listening(state):
                pass


async def test_a_dead_engine_fails_its_streams_and_the_probes():
    async with kit(delay_s=0.01, fail_at=5) as server:
        answer = await server.json("/v1/completions", ASKED, status=500)
        assert answer["error"]["code"] == "engine_failed"
        assert "fire" not in answer["error"]["message"]
        assert (await server.session.get(server.url + "/health")).status == 500
        assert (await server.session.get(server.url + "/ready")).status == 503
        await server.json("/v1/completions", ASKED, status=500)
        assert (await server.session.get(server.url + "/metrics")).status == 200
