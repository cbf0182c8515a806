from __future__ import annotations

import msgspec
import pytest

from fastserve_jax.api.chat import ChatRequest
from fastserve_jax.api.completions import CompletionRequest
from fastserve_jax.api.responses import ResponseRequest, SocketRequest
from fastserve_jax.api.usage import StreamOptions, usage_wanted
from fastserve_jax.errors import InvalidRequest


def completion(**fields: object) -> CompletionRequest:
    return msgspec.convert({"model": "m", "prompt": "x", **fields}, CompletionRequest)


def chat(**fields: object) -> ChatRequest:
    hello = [{"role": "user", "content": "hi"}]
    return msgspec.convert({"model": "m", "messages": hello, **fields}, ChatRequest)


def response(**fields: object) -> ResponseRequest:
    return msgspec.convert({"model": "m", "input": "hi", **fields}, ResponseRequest)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompts(4) == prompts


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [[1], []], ["a", 1], ["a", [1]], ["a", ""], ["a"] * 5]
)
def test_empty_and_mixed_prompts_are_refused(prompt):
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt).prompts(4)
    assert caught.value.param == "prompt"


def test_no_tokens_only_together_with_echo():
    completion(max_tokens=0, echo=True).check()
    for fields in ({"max_tokens": 0}, {"max_tokens": -1, "echo": True}):
        with pytest.raises(InvalidRequest):
            completion(**fields).check()


def test_text_parts_are_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "5", "tool_call_id": "c1"},
        ]
    )
    assert asked.turns() == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages[0].content[0]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_messages_that_are_not_text_are_refused(message, param):
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[message]).turns()
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_unserved_chat_fields_are_named(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields).check()
    assert caught.value.param == param


def test_harmless_chat_fields_pass():
    chat(
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        reasoning_effort="low",
        user="u",
        parallel_tool_calls=False,
        modalities=["text"],
        response_format={"type": "text"},
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="auto",
    ).check()


def test_the_newer_name_of_the_token_limit_wins():
    assert chat(max_tokens=3, max_completion_tokens=5).token_limit() == 5
    assert chat(max_tokens=3).token_limit() == 3
    assert chat().token_limit() is None


def test_a_responses_input_may_hold_earlier_outputs():
    earlier = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "yes", "annotations": []}],
    }
    asked = response(input=[{"role": "user", "content": "hi"}, earlier])
    assert asked.turns() == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ],
)
def test_unserved_response_fields_are_named(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        response(**fields).check()
    assert caught.value.param == param


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function_call", "name": "f"},
        {"type": "item_reference", "id": "x"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]},
        {"role": "tool", "content": "x"},
        {"role": "user"},
    ],
)
def test_items_that_are_not_messages_of_text_are_refused(item):
    with pytest.raises(InvalidRequest):
        response(input=[item]).turns()


@pytest.mark.parametrize("lane", ["", "a b", "x" * 257, "é"])
def test_lane_names_are_plain(lane):
    asked = SocketRequest(type="response.create", model="m", input="x", stream_id=lane)
    with pytest.raises(InvalidRequest):
        asked.check_lane()


def test_stream_options_need_a_stream():
    options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    assert usage_wanted(True, options) == (True, True)
    assert usage_wanted(True, StreamOptions(continuous_usage_stats=True)) == (False, False)
    assert usage_wanted(True, None) == (False, False)
    with pytest.raises(InvalidRequest):
        usage_wanted(False, options)
