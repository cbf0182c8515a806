from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

import fastserve_jax
from fastserve_jax import AsyncClient
from fastserve_jax.api.response_events import Incomplete, TextDelta
from fastserve_jax.errors import (
    DeadlineExceeded,
    EngineFailed,
    FastServeError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
)
from fastserve_jax.server.config import ServerConfig

from ..server.kit import MODEL, answer_to, kit, token_ids

HELLO = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = token_ids("user: hi\nassistant: ")


def client(url: str, **options: object) -> AsyncClient:
    return AsyncClient(url, **{"backoff_s": 0.001, **options})


async def read(api: AsyncClient, **fields: object) -> None:
    async with api.stream_complete("x", **fields) as chunks:
        async for _ in chunks:
            pass


async def test_every_call_against_a_server_with_a_key():
    async with (
        kit(ServerConfig(api_keys=("k",))) as server,
        client(server.url, api_key="k") as api,
    ):
        assert [model.id for model in await api.models()] == [MODEL]
        done = await api.complete("hello", max_tokens=12, seed=3)
        assert done.choices[0].text == answer_to(token_ids("hello"), 3, 12)[0]
        said = await api.chat(HELLO, max_tokens=12, seed=3)
        assert said.choices[0].message.content == answer_to(CHAT_PROMPT, 3, 12)[0]
        response = await api.respond("hi", max_output_tokens=12, seed=3)
        assert response.output_text == said.choices[0].message.content
        tokens = (await api.tokenize("hello", add_special_tokens=False)).tokens
        assert await api.detokenize(tokens) == "hello"
        assert (await api.complete(tokens, max_tokens=1)).usage.prompt_tokens == 5


async def test_streams_join_to_the_whole():
    async with kit() as server, client(server.url + "/v1/") as api:
        async with api.stream_complete("hello", max_tokens=12, seed=3) as chunks:
            text = "".join([c.text async for chunk in chunks for c in chunk.choices])
        assert text == answer_to(token_ids("hello"), 3, 12)[0]
        async with api.stream_chat(HELLO, max_tokens=12, seed=3) as chunks:
            deltas = [c.delta.content async for chunk in chunks for c in chunk.choices]
        assert "".join([d for d in deltas if d]) == answer_to(CHAT_PROMPT, 3, 12)[0]


async def test_leaving_a_stream_ends_it_on_the_server():
    async with kit(delay_s=0.01) as server, client(server.url) as api:
        async with api.stream_complete("hello", max_tokens=400, ignore_eos=True) as chunks:
            async for _ in chunks:
                break
        await server.quiet()
        assert server.engine.stats().output_tokens < 100
        assert (await api.complete("hello", max_tokens=2)).choices


async def test_a_socket_carries_several_responses_at_once_and_a_conversation():
    async with kit() as server, client(server.url) as api, api.websocket() as socket:

        async def ask(text: str, **fields: object) -> Incomplete:
            deltas = []
            fields = {"max_output_tokens": 8, "seed": 3, "ignore_eos": True, **fields}
            async for event in socket.respond(text, **fields):
                if isinstance(event, TextDelta):
                    deltas.append(event.delta)
            assert isinstance(event, Incomplete)
            assert "".join(deltas) == event.response.output_text
            return event

        texts = ["one", "two", "three"]
        answers = await asyncio.gather(*map(ask, texts))
        for text, answer in zip(texts, answers, strict=True):
            prompt = token_ids(f"user: {text}\nassistant: ")
            assert answer.response.output_text == answer_to(prompt, 3, 8, eos=False)[0]
        last = answers[-1].response
        more = await ask("more", previous_response_id=last.id)
        prompt = f"user: three\nassistant: {last.output_text}\nuser: more\nassistant: "
        assert more.response.output_text == answer_to(token_ids(prompt), 3, 8, eos=False)[0]
        with pytest.raises(InvalidRequest) as caught:
            await ask("x", temperature=9.0)
        assert caught.value.param == "temperature"
        with pytest.raises(InvalidRequest):
            await ask("x", previous_response_id="nope")
        await ask("the socket goes on")


async def test_a_lost_socket_ends_its_readers():
    async with kit(delay_s=0.01) as server, client(server.url) as api, api.websocket() as socket:
        events = socket.respond("hi", max_output_tokens=400, ignore_eos=True)
        await anext(events)
        for gate in list(server.state.slow_readers._gates):
            gate.transport.abort()
        with pytest.raises(EngineFailed):
            async for _ in events:
                pass
        with pytest.raises(EngineFailed):
            await anext(socket.respond("again"))


async def test_the_servers_errors_come_back_as_themselves():
    async with (
        kit(ServerConfig(api_keys=("k",)), nan=[(1, 0), (2, 2)]) as server,
        client(server.url, api_key="k") as api,
    ):
        with pytest.raises(EngineFailed, match="not finite"):
            await api.complete("x", ignore_eos=True)
        with pytest.raises(EngineFailed, match="not finite"):
            await read(api, ignore_eos=True)
        with pytest.raises(InvalidRequest) as bad:
            await api.complete("x", temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(ModelNotFound):
            await api.complete("x", model="other")
        with pytest.raises(DeadlineExceeded):
            await api.complete("x", deadline_ms=0.0001)
        async with client(server.url, api_key="wrong") as stranger:
            with pytest.raises(Unauthorized):
                await stranger.models()
            with pytest.raises(Unauthorized):
                async with stranger.websocket():
                    pass


async def test_an_unknown_field_is_found_before_anything_is_sent():
    async with client("http://127.0.0.1:9") as api:
        with pytest.raises(TypeError, match="max_tokenz"):
            await api.complete("x", model="m", max_tokenz=3)


@asynccontextmanager
async def flaky(*answers):
    """A server that gives each of `answers` once, then 200s; counts requests."""
    seen: list[str] = []
    left = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        if left:
            answer = left.pop(0)
            if callable(answer):
                return await answer(request)
            status, headers = answer
            return web.Response(status=status, headers=headers, text="not JSON")
        return web.json_response({"object": "list", "data": []})

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


async def hang_up(request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize("first", [(503, {}), (429, {"Retry-After": "0"}), (502, {}), hang_up])
async def test_a_server_that_is_busy_or_away_is_asked_again(first):
    async with flaky(first, first) as (url, seen), client(url, max_retries=2) as api:
        assert await api.models() == []
        assert len(seen) == 3


async def test_retries_have_an_end():
    async with flaky(*[(503, {})] * 9) as (url, seen), client(url, max_retries=2) as api:
        with pytest.raises(Overloaded):
            await api.models()
        assert len(seen) == 3
    async with flaky(*[(429, {})] * 9) as (url, seen), client(url, max_retries=0) as api:
        with pytest.raises(Overloaded) as caught:
            await api.models()
        assert len(seen) == 1
        assert caught.value.status == 429


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 504])
async def test_what_asking_again_cannot_mend_is_not_asked_again(status):
    async with flaky((status, {})) as (url, seen), client(url) as api:
        with pytest.raises(FastServeError) as caught:
            await api.models()
        assert caught.value.status == status
        assert len(seen) == 1


async def test_retry_after_is_waited_for_unless_it_is_too_long(monkeypatch):
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr("fastserve_jax.client.asyncio.sleep", sleep)
    async with flaky((503, {"Retry-After": "7"})) as (url, _), client(url) as api:
        await api.models()
        assert pauses == [7.0]
    async with flaky((503, {"Retry-After": "3600"})) as (url, seen), client(url) as api:
        with pytest.raises(Overloaded) as caught:
            await api.models()
        assert caught.value.retry_after_s == 3600
        assert len(seen) == 1


async def test_nothing_is_asked_again_once_tokens_have_come():
    async def cut_off(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        chunk = b'{"id":"x","object":"text_completion","created":1,"model":"m","choices":[]}'
        await answer.write(b"data: " + chunk + b"\n\n")
        request.transport.abort()
        return answer

    async with flaky(cut_off) as (url, seen), client(url) as api:
        with pytest.raises(EngineFailed, match="mid-stream"):
            await read(api, model="m")
        assert len(seen) == 1


async def test_a_stream_without_its_end_is_not_taken_for_whole():
    async def short(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"", content_type="text/event-stream")

    async with flaky(short) as (url, _), client(url) as api:
        with pytest.raises(EngineFailed, match="before it was complete"):
            await read(api, model="m")


async def test_no_server_at_all():
    async with client("http://127.0.0.1:9", max_retries=1) as api:
        with pytest.raises(FastServeError, match="no server answers") as caught:
            await api.models()
        assert caught.value.code == "unreachable"
        with pytest.raises(FastServeError, match="no server answers"):
            async with api.websocket():
                pass


async def test_the_rate_limit_is_an_error_of_its_own():
    async def limited(request: web.Request) -> web.StreamResponse:
        error = {"message": "slow", "type": "t", "param": None, "code": "rate_limit_exceeded"}
        return web.json_response({"error": error}, status=429)

    async with flaky(limited) as (url, _), client(url, max_retries=0) as api:
        with pytest.raises(RateLimited):
            await api.models()


def test_importing_the_package_is_cheap():
    probe = (
        "import sys, fastserve_jax; print(sorted({'jax', 'aiohttp', 'flax'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        fastserve_jax.nothing  # noqa: B018
