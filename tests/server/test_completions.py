from __future__ import annotations

import json

import pytest

from fastserve_jax.api.sampling import choice_seed

from . import openai_schema
from .kit import MODEL, LetterTokenizer, answer_to, events_of, kit, token_ids

TOKENIZER = LetterTokenizer()


def body(prompt: object = "hello", **fields: object) -> dict:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 12, "seed": 3, **fields}


async def chunks(server, fields: dict) -> list[dict]:
    async with await server.post("/v1/completions", {**fields, "stream": True}) as answer:
        *events, last = await events_of(answer)
    assert last.data == "[DONE]"
    return [json.loads(event.data) for event in events]


def joined(chunks: list[dict], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


async def test_the_answer_is_the_devices_text_in_openais_shape():
    async with kit() as server:
        answer = await server.json("/v1/completions", body())
        openai_schema.check("CreateCompletionResponse", answer)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == answer_to(token_ids("hello"), 3, 12)
        assert choice["logprobs"] is None
        assert answer["usage"]["prompt_tokens"] == 6
        await server.quiet()


async def test_the_model_may_be_left_out():
    async with kit() as server:
        answer = await server.json("/v1/completions", {"prompt": "hello", "max_tokens": 1})
    assert answer["model"] == MODEL


async def test_the_four_forms_of_a_prompt_agree():
    ids = token_ids("hello")
    async with kit() as server:
        texts = [
            (await server.json("/v1/completions", body(prompt)))["choices"][0]["text"]
            for prompt in ("hello", ["hello"], ids, [ids])
        ]
    assert len(set(texts)) == 1


async def test_several_prompts_and_choices_have_their_own_index_and_seed():
    prompts = ["one", "two two", "three"]
    async with kit() as server:
        asked = body(prompts, n=2, ignore_eos=True)
        answer = await server.json("/v1/completions", asked)
        streamed = await chunks(server, asked)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        prompt, k = divmod(choice["index"], 2)
        seed = choice_seed(3, k)
        text, _ = answer_to(token_ids(prompts[prompt]), seed, 12, eos=False)
        assert choice["text"] == text
        assert joined(streamed, choice["index"]) == text
    assert answer["usage"]["prompt_tokens"] == sum(len(token_ids(p)) for p in prompts)
    assert answer["usage"]["completion_tokens"] == 6 * 12


async def test_unseeded_requests_differ():
    async with kit() as server:
        asked = body(seed=None, ignore_eos=True, max_tokens=20)
        texts = {
            (await server.json("/v1/completions", asked))["choices"][0]["text"] for _ in range(4)
        }
    assert len(texts) > 1


async def test_streaming_gives_the_same_text_and_exact_usage():
    async with kit() as server:
        whole = await server.json("/v1/completions", body())
        options = {"include_usage": True, "continuous_usage_stats": True}
        plain = await chunks(server, body())
        counted = await chunks(server, body(stream_options=options))
    text = whole["choices"][0]["text"]
    assert joined(plain) == joined(counted) == text
    assert plain[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all("usage" not in chunk for chunk in plain)
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    spent = [chunk["usage"]["completion_tokens"] for chunk in counted]
    assert spent == sorted(spent)
    assert spent[0] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_scores_the_prompt_as_scoring_tools_read_it(stream):
    ids = token_ids("hello")
    fields = body([ids], echo=True, logprobs=1, max_tokens=1, temperature=0, ignore_eos=True)
    async with kit() as server:
        if stream:
            parts = [c for chunk in await chunks(server, fields) for c in chunk["choices"]]
            text = "".join(part["text"] for part in parts)
            logprobs = {
                key: [value for part in parts for value in part["logprobs"][key]]
                for key in parts[0]["logprobs"]
            }
        else:
            answer = await server.json("/v1/completions", fields)
            text, logprobs = (answer["choices"][0][key] for key in ("text", "logprobs"))
    assert text.startswith("hello")
    assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    scored = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    for token, logprob, top in list(scored)[1:]:
        assert top[token] == logprob  # the very same float
    assert logprobs["text_offset"][-1] == 5
    for token, offset in zip(logprobs["tokens"][1:], logprobs["text_offset"][1:], strict=True):
        assert text[offset:].startswith(token)


async def test_echo_of_no_tokens_is_the_prompt_alone():
    async with kit() as server:
        asked = body("hello", echo=True, max_tokens=0, logprobs=0)
        answer = await server.json("/v1/completions", asked)
        streamed = await chunks(server, asked)
    (choice,) = answer["choices"]
    assert choice["text"] == joined(streamed) == "hello"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 6
    assert answer["usage"]["completion_tokens"] == 0


async def test_stop_strings_cut_text_and_logprobs_and_free_the_request():
    text, _ = answer_to(token_ids("hello"), 3, 100, eos=False)
    stop = text[10:13]
    cut = text.index(stop)
    fields = body(max_tokens=100, stop=["\x00never", stop], ignore_eos=True, logprobs=0)
    async with kit() as server:
        answer = await server.json("/v1/completions", fields)
        streamed = await chunks(server, fields)
        kept = await server.json("/v1/completions", {**fields, "include_stop_str_in_output": True})
        await server.quiet()
        assert server.engine.stats().finished == 3
    (choice,) = answer["choices"]
    assert choice["text"] == joined(streamed) == text[:cut]
    assert choice["finish_reason"] == streamed[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(offset < cut for offset in choice["logprobs"]["text_offset"])
    assert kept["choices"][0]["text"] == text[: cut + len(stop)]
    assert answer["usage"]["completion_tokens"] < 100


async def test_stop_ids_end_a_request():
    text, _ = answer_to(token_ids("hello"), 3, 12, eos=False)
    stop_id = TOKENIZER.encode(text[3], add_special=False)[0]
    async with kit() as server:
        asked = body(stop_token_ids=[stop_id], ignore_eos=True, return_token_ids=True)
        (choice,) = (await server.json("/v1/completions", asked))["choices"]
    assert choice["text"] == text[: text.index(text[3])]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"][-1] == stop_id
    assert choice["prompt_token_ids"] == token_ids("hello")


async def test_prompt_logprobs_by_token_id():
    async with kit() as server:
        answer = await server.json("/v1/completions", body(prompt_logprobs=2))
    first, *rest = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [str(id) in scores for id, scores in zip(token_ids("hello")[1:], rest, strict=True)]


async def test_numbers_that_are_not_finite_fail_that_request_alone():
    async with kit(nan=[(1, 0), (2, 3)]) as server:
        answer = await server.json("/v1/completions", body(ignore_eos=True), status=500)
        openai_schema.check("ErrorResponse", answer)
        assert answer["error"]["code"] == "engine_failed"
        fields = body(ignore_eos=True, stream=True)
        async with await server.post("/v1/completions", fields) as response:
            events = await events_of(response)
        assert json.loads(events[-1].data)["error"]["code"] == "engine_failed"
        assert len(events) == 4
        await server.json("/v1/completions", body())
        await server.quiet()


async def test_a_deadline_is_504_before_the_first_token_and_an_event_after():
    async with kit(delay_s=0.05) as server:
        late = await server.json("/v1/completions", body(deadline_ms=1), status=504)
        assert late["error"]["code"] == "deadline_exceeded"
        headers = {"X-Request-Timeout-Ms": "1"}
        async with await server.post("/v1/completions", body(), headers=headers) as answer:
            assert answer.status == 504
        fields = body(max_tokens=400, ignore_eos=True, deadline_ms=1000, stream=True)
        async with await server.post("/v1/completions", fields) as answer:
            events = await events_of(answer)
        assert len(events) > 1
        assert json.loads(events[-1].data)["error"]["code"] == "deadline_exceeded"
        await server.quiet()
