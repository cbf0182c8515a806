"""The real server under the clients that people use: openai, lm-eval, and our own."""

import asyncio
import json
import os
import subprocess
import sys

import openai
import pytest

from fastserve_jax import AsyncClient
from tests.serve.conftest import SMALL, started

PROMPT = "Once upon a time, there was a little girl named"
STORY = " Lily. She loved to play outside in the park."


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


async def test_openai_completions_with_logprobs(client, server):
    answer = await client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=14, temperature=0, logprobs=2
    )
    assert STORY.startswith(answer.choices[0].text)
    assert len(answer.choices[0].text) > 20
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] == pytest.approx(-0.0765, abs=1e-3)  # llama.cpp's figure
    assert all(
        value == max(top.values())
        for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    )
    assert answer.usage.prompt_tokens == 14


async def test_openai_chat_streamed_equals_whole(client, server):
    asked = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "temperature": 0.8,
        "seed": 5,
        "max_tokens": 40,
    }
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == 40


async def test_openai_responses_over_http_and_websocket(client, server):
    asked = {"model": server.model, "input": "One day, a big dog", "temperature": 0}
    whole = await client.responses.create(**asked, max_output_tokens=20)
    assert whole.status == "incomplete"
    text = ""
    async with client.responses.connect() as connection:
        await connection.response.create(**asked, max_output_tokens=20)
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type in ("response.completed", "response.incomplete"):
                break
    assert text == whole.output_text
    assert len(text) > 20


async def test_our_client_streams_the_same(server):
    async with AsyncClient(server.url) as client:
        rules = {"max_tokens": 30, "temperature": 0}
        whole = await client.complete(model=server.model, prompt=PROMPT, **rules)
        async with client.stream_complete(model=server.model, prompt=PROMPT, **rules) as stream:
            text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    assert text == whole.choices[0].text


async def test_many_streams_at_once_leave_nothing_and_compile_nothing(client, server):
    async def one(i):
        stream = await client.completions.create(
            model=server.model,
            prompt=PROMPT[: 4 + i % 40],
            max_tokens=5 + 7 * i % 90,
            temperature=i % 2,
            seed=i,
            stream=True,
            logprobs=1 if i % 3 == 0 else None,
            presence_penalty=i % 5 / 5,
        )
        count = 0
        async for _ in stream:
            count += 1
            if i % 4 == 3 and count == 3:
                await stream.close()
                return

    await asyncio.gather(*(one(i) for i in range(48)))
    for _ in range(100):
        if server.metric("num_requests_running") + server.metric("kv_cache_usage_perc") == 0:
            break
        await asyncio.sleep(0.05)
    assert server.metric("num_requests_running") == 0
    assert server.metric("num_requests_waiting") == 0
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("num_preemptions_total") > 0
    assert server.metric("recompiles_after_ready_total") == 0


TASK = """
task: stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
DOCS = [
    {"text": PROMPT, "choices": [" Lily", " dog", " quick"], "label": 0},
    {"text": "One day, a big dog", "choices": [" named", " the", " Once"], "label": 0},
    {"text": "She loved to play", "choices": [" qu", " outside", " day"], "label": 1},
]


def test_lm_eval_scores_with_echo_logprobs(server, tmp_path):
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "stories.yaml").write_text(TASK.format(data=data))
    arguments = f"model={server.model},base_url={server.url}/v1/completions,"
    arguments += "tokenizer_backend=remote,num_concurrent=1,max_length=256"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", "stories", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    assert ran.returncode == 0, ran.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"])
    assert [row["acc"] for row in rows] == [1.0, 1.0, 1.0]
    got = float(rows[0]["filtered_resps"][0][0])
    # " Lily" is one token; llama.cpp says -0.0765 behind a BOS, which lm-eval leaves out
    assert got == pytest.approx(-0.0765, abs=0.02)
    # greedy, which lm-eval tells by the very same float standing in both lists
    assert [str(r["filtered_resps"][0][1]) for r in rows[:1]] == ["True"]


async def test_a_draft_model_changes_no_text(shared, cache, client, server):
    """One that is always right, for a text without repetitions. That it is asked depends on what
    that takes here; what is answered does not."""
    path = str(shared("models/stories260K.gguf"))
    sets = [flag for name in SMALL for flag in ("--set", name)]
    asked = {"model": server.model, "prompt": PROMPT, "max_tokens": 60}
    rules = [{"temperature": 0}, {"temperature": 0.9, "seed": 4, "logprobs": 2}]
    want = [await client.completions.create(**asked, **rule) for rule in rules]
    with started(path, cache, "--draft-model", path, *sets) as drafted:
        async with openai.AsyncOpenAI(base_url=f"{drafted.url}/v1", api_key="none") as other:
            got = [await other.completions.create(**asked, **rule) for rule in rules]
    for one, another in zip(got, want, strict=True):
        assert one.choices[0].text == another.choices[0].text
    assert got[1].choices[0].logprobs.tokens == want[1].choices[0].logprobs.tokens
