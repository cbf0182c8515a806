"""The official client, unchanged, over a real socket."""

from __future__ import annotations

import openai
import pytest
from openai import AsyncOpenAI

from fastserve_jax.server.config import ServerConfig

from .kit import MODEL, answer_to, kit, token_ids

HELLO = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = token_ids("user: hi\nassistant: ")
KEY = "sk-test"
CONFIG = ServerConfig(api_keys=(KEY,))


def client(url: str, **options: object) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, **{"max_retries": 0, **options})


async def test_models_and_chat():
    async with kit(CONFIG) as server, client(server.url) as ai:
        models = [model.id async for model in ai.models.list()]
        assert models == [MODEL]
        assert (await ai.models.retrieve(MODEL)).id == MODEL
        answer = await ai.chat.completions.create(
            model=MODEL, messages=HELLO, seed=3, max_completion_tokens=12, logprobs=True
        )
    text, finish = answer_to(CHAT_PROMPT, 3, 12)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, finish)
    assert answer.usage.prompt_tokens == len(CHAT_PROMPT)
    assert answer.choices[0].logprobs.content[0].logprob == -0.5
    assert answer._request_id.startswith("req_")


async def test_chat_stream_with_usage():
    async with kit(CONFIG) as server, client(server.url) as ai:
        stream = await ai.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            seed=3,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer_to(CHAT_PROMPT, 3, 12)[0]
    assert chunks[-1].usage.completion_tokens > 0


async def test_the_streaming_helper_accumulates():
    text, _ = answer_to(CHAT_PROMPT, 3, 12, eos=False)
    asked = {"model": MODEL, "messages": HELLO, "seed": 3, "max_tokens": 12, "stop": text[5:8]}
    async with (
        kit(CONFIG) as server,
        client(server.url) as ai,
        ai.chat.completions.stream(**asked, extra_body={"ignore_eos": True}) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(text[5:8])]


async def test_completions_with_echo_and_logprobs():
    async with kit(CONFIG) as server, client(server.url) as ai:
        answer = await ai.completions.create(
            model=MODEL,
            prompt=token_ids("hello"),
            max_tokens=1,
            echo=True,
            logprobs=1,
            extra_body={"ignore_eos": True},
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == 7
    assert answer.choices[0].text.startswith("hello")


async def test_responses_whole_streamed_stored_and_deleted():
    async with kit(CONFIG) as server, client(server.url) as ai:
        full, _ = answer_to(CHAT_PROMPT, 3, 12, eos=False)
        extra = {"seed": 3, "stop": full[5:8], "ignore_eos": True}
        asked = {"model": MODEL, "input": "hi", "max_output_tokens": 12, "extra_body": extra}
        whole = await ai.responses.create(**asked)
        events = [event async for event in await ai.responses.create(**asked, stream=True)]
        async with ai.responses.stream(**asked) as helper:
            final = await helper.get_final_response()
        text = full[: full.index(full[5:8])]
        assert whole.output_text == text
        assert final.output_text == text
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == text
        assert (await ai.responses.retrieve(whole.id)).output_text == text
        await ai.responses.delete(whole.id)
        with pytest.raises(openai.NotFoundError):
            await ai.responses.retrieve(whole.id)


async def test_responses_over_a_websocket_continue_each_other():
    async with (
        kit(CONFIG) as server,
        client(server.url) as ai,
        ai.responses.connect() as connection,
    ):
        previous = None
        for text in ("one", "two"):
            await connection.response.create(
                model=MODEL, input=text, max_output_tokens=8, previous_response_id=previous
            )
            async for event in connection:
                if event.type in ("response.completed", "response.incomplete"):
                    previous = event.response.id
                    break
        await connection.response.create(
            model=MODEL, input="x", previous_response_id="resp_unknown"
        )
        error = await connection.recv()
        assert error.type == "error"
        assert error.status == 400
        assert error.error.code == "previous_response_not_found"


async def test_errors_arrive_as_the_clients_own():
    async with kit(CONFIG) as server, client(server.url) as ai:
        with pytest.raises(openai.BadRequestError) as bad:
            await ai.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
        assert bad.value.param == "temperature"
        assert bad.value.request_id.startswith("req_")
        with pytest.raises(openai.NotFoundError) as missing:
            await ai.chat.completions.create(model="other", messages=HELLO)
        assert missing.value.code == "model_not_found"
        stranger = ai.with_options(api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_an_error_in_mid_stream_raises():
    async with kit(CONFIG, nan=[(1, 3)]) as server, client(server.url) as ai:
        stream = await ai.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="not finite"):
            async for _ in stream:
                pass


async def test_it_waits_as_told_while_the_server_loads():
    async with kit(CONFIG, ready=False) as server, client(server.url) as ai:
        with pytest.raises(openai.InternalServerError) as busy:
            await ai.models.list()
        assert busy.value.status_code == 503
        assert int(busy.value.response.headers["Retry-After"]) > 0
