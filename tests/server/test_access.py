from __future__ import annotations

import logging

import aiohttp
import pytest

from fastserve_jax.server.app import create_app
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.middleware import PROBES

from .kit import MODEL, kit

CONFIG = ServerConfig(api_keys=("first", "second"))


async def test_every_route_but_the_probes_needs_a_key():
    async with kit(CONFIG) as server, aiohttp.ClientSession() as stranger:
        routes = {
            (route.method, route.resource.canonical.replace("{id}", "x"))
            for route in create_app(server.state).router.routes()
        }
        assert {path for _, path in routes} >= PROBES
        assert len(routes) > 15
        for method, path in [*sorted(routes), ("OPTIONS", "/v1/models"), ("GET", "/nothing")]:
            async with stranger.request(method, server.url + path) as answer:
                assert answer.status == (200 if path in PROBES else 401), (method, path)
                if answer.status == 401 and method != "HEAD":
                    assert (await answer.json())["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first", 200),
        ("Bearer second", 200),
        ("bearer first", 200),
        ("Bearer third", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("", 401),
        ("Basic first", 401),
        ("first", 401),
        ("Bearer firs", 401),
        ("Bearer first second", 401),
        ("Bearer f\u00efrst", 401),
    ],
)
async def test_only_a_whole_key_opens(header, status):
    async with kit(CONFIG) as server, aiohttp.ClientSession() as session:
        headers = {"Authorization": header}
        async with session.get(server.url + "/v1/models", headers=headers) as answer:
            assert answer.status == status


async def test_a_websocket_needs_a_key_too():
    async with kit(CONFIG) as server, aiohttp.ClientSession() as stranger:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await stranger.ws_connect(server.url + "/v1/responses")
        assert caught.value.status == 401


async def test_a_page_of_another_origin_may_not_open_a_websocket():
    async with kit() as server:
        url = server.url + "/v1/responses"
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await server.session.ws_connect(url, headers={"Origin": origin})
            assert caught.value.status == 403
        async with server.session.ws_connect(url, headers={"Origin": server.url}):
            pass


async def test_without_keys_all_is_open():
    async with kit() as server:
        assert (await server.session.get(server.url + "/v1/models")).status == 200


async def test_only_allowed_hosts_are_answered():
    config = ServerConfig(allowed_hosts=("127.0.0.1", "example.org"))
    async with kit(config) as server:
        for host, status in (("example.org:80", 200), ("evil.example", 400), ("127.0.0.1", 200)):
            async with server.session.get(server.url + "/version", headers={"Host": host}) as got:
                assert got.status == status
        async with server.session.get(server.url + "/health", headers={"Host": "10.0.0.1"}) as got:
            assert got.status == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", True), ("", False), ("x" * 200, False), ("a b", False), ("\u00e9", False)],
)
async def test_a_request_keeps_its_id_if_it_is_sane(given, kept):
    async with kit() as server:
        headers = {"X-Request-Id": given}
        async with server.session.get(server.url + "/version", headers=headers) as answer:
            got = answer.headers["X-Request-Id"]
    assert got == given if kept else got.startswith("req_")


async def test_the_access_log_has_ids_and_never_text(caplog):
    caplog.set_level(logging.DEBUG)
    async with kit(ServerConfig(access_log=True)) as server:
        asked = {"model": MODEL, "prompt": "supersecretwords", "max_tokens": 20, "seed": 1}
        asked["ignore_eos"] = True
        headers = {"X-Request-Id": "my-id"}
        async with await server.post("/v1/completions", asked, headers=headers) as answer:
            text = (await answer.json())["choices"][0]["text"]
    lines = [r.getMessage() for r in caplog.records if r.name == "fastserve_jax.access"]
    assert len(lines) == 1
    assert lines[0].startswith("my-id POST /v1/completions 200 ")
    assert "supersecret" not in caplog.text
    assert len(text.strip()) > 10
    assert text.strip() not in caplog.text


async def test_the_access_log_is_off_by_default(caplog):
    caplog.set_level(logging.DEBUG)
    async with kit() as server:
        await server.session.get(server.url + "/version")
    assert not [r for r in caplog.records if r.name == "fastserve_jax.access"]
