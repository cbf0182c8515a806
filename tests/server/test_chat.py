from __future__ import annotations

import json

import pytest

from fastserve_jax.api.sampling import choice_seed

from . import openai_schema
from .kit import MODEL, answer_to, events_of, kit, token_ids

HELLO = [{"role": "user", "content": "hi"}]
PROMPT = token_ids("user: hi\nassistant: ")


def body(**fields: object) -> dict:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 12, "seed": 3, **fields}


async def chunks(server, fields: dict) -> list[dict]:
    async with await server.post("/v1/chat/completions", {**fields, "stream": True}) as answer:
        *events, last = await events_of(answer)
    assert last.data == "[DONE]"
    return [json.loads(event.data) for event in events]


async def test_the_answer_is_the_devices_text_in_openais_shape():
    async with kit() as server:
        answer = await server.json("/v1/chat/completions", body())
    openai_schema.check("CreateChatCompletionResponse", answer)
    (choice,) = answer["choices"]
    text, finish = answer_to(PROMPT, 3, 12)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == finish
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


async def test_logprobs_have_bytes_and_join_to_the_text():
    async with kit() as server:
        asked = body(logprobs=True, top_logprobs=2, ignore_eos=True)
        answer = await server.json("/v1/chat/completions", asked)
        streamed = await chunks(server, asked)
    openai_schema.check("CreateChatCompletionResponse", answer)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    special = (list(b"<s>"), list(b"</s>"))
    raw = b"".join(bytes(e["bytes"]) for e in content if e["bytes"] not in special)
    assert raw.decode("utf-8", "replace") == choice["message"]["content"]
    parts = [c["choices"][0]["logprobs"] for c in streamed if c["choices"][0].get("logprobs")]
    assert [entry for part in parts for entry in part["content"]] == content


async def test_a_stream_opens_with_the_role_and_ends_with_the_reason():
    async with kit() as server:
        options = {"include_usage": True}
        streamed = await chunks(server, body(n=2, ignore_eos=True, stream_options=options))
    for chunk in streamed:
        openai_schema.check("CreateChatCompletionStreamResponse", chunk)
    *streamed, last = streamed
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 24
    assert {chunk["usage"] for chunk in streamed} == {None}
    for index in range(2):
        mine = [c for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == "length"
        assert all(c["finish_reason"] is None for c in mine[:-1])
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == answer_to(PROMPT, choice_seed(3, index), 12, eos=False)[0]


async def test_without_a_limit_the_context_is_the_limit():
    async with kit() as server:
        asked = body(max_tokens=None, ignore_eos=True)
        answer = await server.json("/v1/chat/completions", asked)
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_text_in_parts_and_the_developers_rules():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    async with kit() as server:
        asked = body(messages=[{"role": "user", "content": parts}])
        answer = await server.json("/v1/chat/completions", asked)
        plain = await server.json("/v1/chat/completions", body())
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_hold_back_and_cut(stream):
    text, _ = answer_to(PROMPT, 3, 60, eos=False)
    stop = text[7:11]
    async with kit() as server:
        asked = body(max_tokens=60, ignore_eos=True, stop=stop)
        if stream:
            pieces = [
                c["choices"][0]["delta"].get("content", "") for c in await chunks(server, asked)
            ]
            shown = "".join(pieces)
        else:
            answer = await server.json("/v1/chat/completions", asked)
            shown = answer["choices"][0]["message"]["content"]
        await server.quiet()
    assert shown == text[: text.index(stop)]


async def test_token_ids_on_request():
    async with kit() as server:
        asked = body(return_token_ids=True, ignore_eos=True, prompt_logprobs=1)
        answer = await server.json("/v1/chat/completions", asked)
        streamed = await chunks(server, body(return_token_ids=True, ignore_eos=True))
    assert answer["prompt_token_ids"] == PROMPT
    assert len(answer["prompt_logprobs"]) == len(PROMPT)
    ids = answer["choices"][0]["token_ids"]
    assert len(ids) == 12
    assert [i for chunk in streamed for i in chunk["choices"][0].get("token_ids", [])] == ids


async def test_a_model_without_a_template_says_so():
    async with kit() as server:
        from dataclasses import replace

        server.state.put(replace(server.state.model(None), template=None))
        answer = await server.json("/v1/chat/completions", body(), status=400)
    assert answer["error"]["code"] == "no_chat_template"
