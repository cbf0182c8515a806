"""Everything a client can get wrong is answered as its own fault, and the server goes on."""

from __future__ import annotations

import asyncio
import gzip
import io
import json

import pytest

from . import openai_schema
from .kit import MODEL, Kit, LetterTokenizer, kit

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "hi"}]


def completion(**fields: object) -> tuple[str, dict]:
    return COMPLETIONS, {"model": MODEL, "prompt": "hi", "max_tokens": 2, **fields}


def chat(**fields: object) -> tuple[str, dict]:
    return CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 2, **fields}


def response(**fields: object) -> tuple[str, dict]:
    return RESPONSES, {"model": MODEL, "input": "hi", "max_output_tokens": 2, **fields}


BAD = [
    (completion(prompt=""), "prompt"),
    (completion(prompt=[]), "prompt"),
    (completion(prompt=[[]]), "prompt"),
    (completion(prompt=None), "prompt"),
    (completion(prompt=[1, "a"]), "prompt"),
    (completion(prompt=[-1]), "prompt"),
    (completion(prompt=[64]), "prompt"),
    (completion(prompt=[2**70]), "prompt"),
    (completion(prompt=[1] * 100_000), "prompt"),
    (completion(prompt="x" * 100_000), "prompt"),
    (completion(prompt=["x"] * 129), "prompt"),
    (completion(n=0), "n"),
    (completion(n=-1), "n"),
    (completion(n=10**9), "n"),
    (completion(n=2**64), "n"),
    (completion(n=1.5), "n"),
    (completion(n=True), "n"),
    (completion(prompt=["a", "b"], n=100), "n"),
    (completion(best_of=5), "best_of"),
    (completion(max_tokens=0), "max_tokens"),
    (completion(max_tokens=-5), "max_tokens"),
    (completion(max_tokens=10**9), "max_tokens"),
    (completion(max_tokens="5"), "max_tokens"),
    (completion(max_tokens=512), "max_tokens"),
    (completion(temperature=-0.1), "temperature"),
    (completion(temperature=2.1), "temperature"),
    (completion(temperature="hot"), "temperature"),
    (completion(top_p=0), "top_p"),
    (completion(top_p=1.1), "top_p"),
    (completion(top_k=-2), "top_k"),
    (completion(min_p=2), "min_p"),
    (completion(presence_penalty=3), "presence_penalty"),
    (completion(frequency_penalty=-3), "frequency_penalty"),
    (completion(repetition_penalty=0), "repetition_penalty"),
    (completion(logprobs=21), "logprobs"),
    (completion(logprobs=-1), "logprobs"),
    (completion(logprobs=10**6), "logprobs"),
    (completion(prompt_logprobs=21), "prompt_logprobs"),
    (completion(stop=["x"] * 100_000), "stop"),
    (completion(stop=["x" * 5000]), "stop"),
    (completion(stop=[1]), "stop[0]"),
    (completion(stop_token_ids=[64]), "stop_token_ids"),
    (completion(logit_bias={"64": 1}), "logit_bias"),
    (completion(logit_bias={"a": 1}), "logit_bias"),
    (completion(logit_bias={"1": 1000}), "logit_bias"),
    (completion(logit_bias=[1]), "logit_bias"),
    (completion(seed=2**63), "seed"),
    (completion(seed="x"), "seed"),
    (completion(min_tokens=3), "min_tokens"),
    (completion(deadline_ms=0), "deadline_ms"),
    (completion(deadline_ms=-1), "deadline_ms"),
    (completion(deadline_ms=10**12), "deadline_ms"),
    (completion(priority=10**12), "priority"),
    (completion(cache_salt="x" * 1000), "cache_salt"),
    (completion(user="x" * 1000), "user"),
    (chat(safety_identifier="x" * 1000), "user"),
    (completion(session_id="x" * 1000), "session_id"),
    (completion(session_id=5), "session_id"),
    (completion(suffix="y"), "suffix"),
    (completion(stream="yes"), "stream"),
    (completion(stream_options={"include_usage": True}), "stream_options"),
    (completion(response_format={"type": "json_object"}), "response_format"),
    (completion(model=5), "model"),
    (chat(messages=[]), "messages"),
    (chat(messages=None), "messages"),
    (chat(messages="hi"), "messages"),
    (chat(messages=["hi"]), "messages[0]"),
    (chat(messages=[{"content": "hi"}]), "messages[0].role"),
    (chat(messages=[{"role": "nobody", "content": "hi"}]), "messages[0].role"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (chat(messages=HELLO * 5000), "messages"),
    (chat(top_logprobs=5), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=1), "logprobs"),
    (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(tools=[{"type": "function"}], tool_choice="required"), "tool_choice"),
    (chat(tools="x"), "tools"),
    (chat(audio={}), "audio"),
    (response(input=""), "input"),
    (response(input=[]), "input"),
    (response(input=5), "input"),
    (response(input=[{"type": "computer_call"}]), "input[0].type"),
    (response(max_output_tokens=-1), "max_output_tokens"),
    (response(background=True), "background"),
    (response(previous_response_id="nope"), "previous_response_id"),
    (response(metadata={"a": 1}), "metadata[...]"),
    (("/tokenize", {}), "prompt"),
    (("/tokenize", {"prompt": "a", "messages": HELLO}), "prompt"),
    (("/detokenize", {"tokens": [64]}), "tokens"),
    (("/detokenize", {"tokens": [True]}), "tokens[0]"),
    (("/detokenize", {}), "tokens"),
]


async def refused(server: Kit, answer, status: int) -> dict:
    """Checks the error's shape; gives it."""
    assert answer.status == status, await answer.text()
    assert answer.content_type == "application/json"
    assert answer.headers["X-Request-Id"]
    body = await answer.json()
    openai_schema.check("ErrorResponse", body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    return body["error"]


async def alive(server: Kit) -> None:
    await server.json(*completion())
    await server.quiet()


@pytest.fixture
async def server():
    async with kit() as server:
        yield server
        await alive(server)
        assert server.engine.failure is None


@pytest.mark.parametrize(
    ("request_", "param"), BAD, ids=[f"{i}-{p}" for i, (_, p) in enumerate(BAD)]
)
async def test_bad_fields_are_400_and_named(server, request_, param):
    path, body = request_
    async with await server.post(path, body) as answer:
        error = await refused(server, answer, 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert server.device.steps == 0


RAW = [
    (b"", 400),
    (b"{", 400),
    (b"null", 400),
    (b"[1]", 400),
    (b'"x"', 400),
    (b"\xff\xfe{}", 400),
    (b'{"model":"fake-model","prompt":"\xff"}', 400),
    (b'{"model":"fake-model","prompt":"\\ud800"}', 400),
    (b'{"model":"fake-model","temperature":NaN}', 400),
    (b'{"model":"fake-model","temperature":Infinity}', 400),
    (b'{"x":' * 50_000 + b"1" + b"}" * 50_000, 400),
    (b"[" * 100_000, 400),
    (b'{"prompt":"' + b"x" * (2 << 20) + b'"}', 413),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(("body", "status"), RAW, ids=[str(i) for i in range(len(RAW))])
async def test_bad_bytes_are_refused(server, path, body, status):
    headers = {"Content-Type": "application/json"}
    data = io.BytesIO(body)
    async with server.session.post(server.url + path, data=data, headers=headers) as answer:
        await refused(server, answer, status)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 5000, "1" * 400 + ".5"])
async def test_numbers_beyond_all_range_are_refused(server, number):
    body = f'{{"model":"fake-model","prompt":"x","temperature":{number},"seed":{number}}}'
    headers = {"Content-Type": "application/json"}
    url = server.url + COMPLETIONS
    async with server.session.post(url, data=body.encode(), headers=headers) as answer:
        await refused(server, answer, 400)


async def test_a_large_body_sent_in_pieces_is_cut_off(server):
    async def pieces():
        for _ in range(64):
            yield b"x" * 65536

    headers = {"Content-Type": "application/json"}
    url = server.url + COMPLETIONS
    async with server.session.post(url, data=pieces(), headers=headers) as answer:
        await refused(server, answer, 413)


async def test_an_overlong_text_is_judged_by_its_head(server, monkeypatch):
    """Encoding all of it would take half a second; and one that only might fit is encoded."""
    lengths = []
    encode = LetterTokenizer.encode

    def counted(self, text, add_special=True):
        lengths.append(len(text))
        return encode(self, text, add_special)

    monkeypatch.setattr(LetterTokenizer, "encode", counted)
    text = "x" * 500_000
    for path, body in (completion(prompt=text), chat(messages=[HELLO[0] | {"content": text}])):
        answer = await server.post(path, body)
        error = await refused(server, answer, 400)
        assert error["code"] == "context_length_exceeded"
    assert max(lengths) < 10_000
    await server.json(*completion(prompt="y" * 400))
    assert 400 in lengths


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_other_media_are_415(server, kind):
    url, headers = server.url + COMPLETIONS, {"Content-Type": kind}
    async with server.session.post(url, data=b"{}", headers=headers) as answer:
        await refused(server, answer, 415)


async def test_a_compressed_body_is_not_unpacked(server):
    bomb = gzip.compress(b"x" * (50 << 20))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    url = server.url + COMPLETIONS
    async with server.session.post(url, data=bomb, headers=headers) as answer:
        await refused(server, answer, 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/tokenize", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/responses/none", 404),
        ("DELETE", "/v1/responses/none", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
    ],
)
async def test_wrong_ways(server, method, path, status):
    async with server.session.request(method, server.url + path) as answer:
        await refused(server, answer, status)
        assert status != 405 or answer.headers["Allow"]


@pytest.mark.parametrize("request_", [completion(model="x"), chat(model="x"), response(model="x")])
async def test_an_unknown_model_is_404(server, request_):
    async with await server.post(*request_) as answer:
        error = await refused(server, answer, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_control_characters_and_unknown_fields_are_fine(server):
    asked = completion(prompt="\x00\x01\ufffd\u202e", whatever={"deep": [1, 2]}, ignore_eos=True)
    answer = await server.json(*asked)
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 2000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_refused(server, raw):
    address = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(address[0], int(address[1]))
    writer.write(raw)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer == b"" or answer.split()[1].startswith(b"4")
    writer.close()
    await writer.wait_closed()


async def test_a_fault_of_ours_says_nothing_of_its_inside(server, monkeypatch, caplog):
    async def broken(*_: object) -> None:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr("fastserve_jax.server.completions._prepare", broken)
    async with await server.post(*completion()) as answer:
        text = await answer.text()
        assert answer.status == 500
    assert json.loads(text)["error"]["type"] == "server_error"
    assert "42" not in text
    assert "42" in caplog.text  # the operator sees it
    monkeypatch.undo()
