from __future__ import annotations

import json

import pytest

from fastserve_jax.server.config import ServerConfig

from . import openai_schema
from .kit import MODEL, answer_to, events_of, kit, token_ids

ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
EVENT_SCHEMAS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
    "response.failed": "ResponseFailedEvent",
}


def body(**fields: object) -> dict:
    return {"model": MODEL, "input": "hi", "max_output_tokens": 12, "seed": 3, **fields}


def text_of(response: dict) -> str:
    return response["output"][0]["content"][0]["text"]


async def test_the_answer_is_the_devices_text_in_openais_shape():
    async with kit() as server:
        asked = body(instructions="be brief", metadata={"a": "b"}, top_logprobs=1)
        answer = await server.json("/v1/responses", asked)
        again = await (await server.session.get(f"{server.url}/v1/responses/{answer['id']}")).json()
    openai_schema.check("Response", answer)
    prompt = token_ids("system: be brief\nuser: hi\nassistant: ")
    text, finish = answer_to(prompt, 3, 12)
    assert text_of(answer) == text
    assert answer["status"] == {"stop": "completed", "length": "incomplete"}[finish]
    assert answer["instructions"] == "be brief"
    assert answer["metadata"] == {"a": "b"}
    assert answer["usage"]["input_tokens"] == len(prompt)
    assert len(answer["output"][0]["content"][0]["logprobs"]) == 12
    assert again == answer


async def test_a_cut_answer_is_incomplete_and_a_stopped_one_complete():
    text, _ = answer_to(token_ids("user: hi\nassistant: "), 3, 12, eos=False)
    async with kit() as server:
        cut = await server.json("/v1/responses", body(ignore_eos=True))
        whole = await server.json("/v1/responses", body(ignore_eos=True, stop=text[5:7]))
    assert cut["status"] == cut["output"][0]["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["status"] == whole["output"][0]["status"] == "completed"
    assert whole["incomplete_details"] is None
    assert whole["completed_at"] >= whole["created_at"]


async def test_a_stream_has_every_event_once_in_order_and_the_deltas_between():
    async with kit() as server:
        asked = body(stream=True, ignore_eos=True, include=["message.output_text.logprobs"])
        async with await server.post("/v1/responses", asked) as answer:
            events = await events_of(answer)
    payloads = [json.loads(event.data) for event in events]
    assert [payload["type"] for payload in payloads] == [event.event for event in events]
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(payloads)))
    for payload in payloads:
        openai_schema.check(EVENT_SCHEMAS[payload["type"]], payload)
    deltas = [p for p in payloads if p["type"] == "response.output_text.delta"]
    others = [p["type"] for p in payloads if p["type"] != "response.output_text.delta"]
    assert others == [*ORDER, "response.incomplete"]
    assert payloads[4]["type"] == payloads[-5]["type"] == "response.output_text.delta"
    text = "".join(delta["delta"] for delta in deltas)
    assert text == text_of(payloads[-1]["response"])
    assert text == answer_to(token_ids("user: hi\nassistant: "), 3, 12, eos=False)[0]
    assert sum(len(delta["logprobs"]) for delta in deltas) == 12


async def test_a_conversation_goes_on_from_what_is_stored():
    async with kit() as server:
        first = await server.json("/v1/responses", body())
        asked = body(input="and?", previous_response_id=first["id"])
        second = await server.json("/v1/responses", asked)
        prompt = f"user: hi\nassistant: {text_of(first)}\nuser: and?\nassistant: "
        assert text_of(second) == answer_to(token_ids(prompt), 3, 12)[0]
        assert second["previous_response_id"] == first["id"]
        url = f"{server.url}/v1/responses/{first['id']}"
        gone = await (await server.session.delete(url)).json()
        assert gone == {"id": first["id"], "object": "response", "deleted": True}
        assert (await server.session.get(url)).status == 404
        assert (await server.session.delete(url)).status == 404
        refused = await server.json("/v1/responses", asked, status=400)
        assert refused["error"]["code"] == "previous_response_not_found"
        assert refused["error"]["param"] == "previous_response_id"


async def test_what_was_not_to_be_stored_is_not():
    async with kit() as server:
        answer = await server.json("/v1/responses", body(store=False))
        assert answer["store"] is False
        assert (await server.session.get(f"{server.url}/v1/responses/{answer['id']}")).status == 404


async def test_a_response_is_kept_for_the_key_that_made_it():
    async with kit(ServerConfig(api_keys=("one", "two"))) as server:
        answer = await server.json("/v1/responses", body())
        url = f"{server.url}/v1/responses/{answer['id']}"
        assert (await server.session.get(url)).status == 200
        other = {"Authorization": "Bearer two"}
        assert (await server.session.get(url, headers=other)).status == 404
        asked = body(previous_response_id=answer["id"])
        async with await server.post("/v1/responses", asked, headers=other) as refused:
            assert refused.status == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_in_the_middle(stream):
    async with kit(nan=[(1, 3)]) as server:
        asked = body(stream=stream, ignore_eos=True)
        if not stream:
            answer = await server.json("/v1/responses", asked, status=500)
            assert answer["error"]["code"] == "engine_failed"
            return
        async with await server.post("/v1/responses", asked) as response:
            events = await events_of(response)
        last = json.loads(events[-1].data)
        openai_schema.check("ResponseFailedEvent", last)
        assert last["response"]["status"] == "failed"
        await server.quiet()
