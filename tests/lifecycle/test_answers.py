"""Answers of a running server beside those that were wanted: figures a person can work out, and
none of a model that is not served."""

import asyncio
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fastserve_jax import AsyncClient
from fastserve_jax.errors import ConfigError, DataError, InvalidRequest
from fastserve_jax.lifecycle import measured
from fastserve_jax.lifecycle.answers import Question, ask, compare, read_questions, served
from fastserve_jax.lifecycle.cli import evaluate
from fastserve_jax.lifecycle.harness import Harness
from fastserve_jax.lifecycle.shown import show_version
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.fakes import _START, link, score
from tests.models.families import FAMILIES
from tests.server.kit import MODEL, answer_to, kit, token_ids


def questions(*pairs):
    return [Question(({"role": "user", "content": q},), reference) for q, reference in pairs]


def test_figures_are_those_of_the_papers():
    wanted = "the cat sat on the mat today"
    asked = questions(("a", wanted), ("b", "a dog barked"), ("c", "nothing alike"))
    found = compare(asked, ["the cat sat on a mat", "a dog barked", "other words here"])
    # Of the first 5 of 6 words, and of pairs of words 3 of 5, are among 7 and 6; in order all five.
    assert found.metrics["rouge1"] == pytest.approx((2 * 5 / (6 + 7) + 1 + 0) / 3)
    assert found.metrics["rouge2"] == pytest.approx((2 * 3 / (5 + 6) + 1 + 0) / 3)
    assert found.metrics["rougeL"] == pytest.approx((2 * 5 / (6 + 7) + 1 + 0) / 3)
    assert found.metrics["exact"] == pytest.approx(1 / 3)
    # Of 12 words 8, of 9 pairs 5, of 6 threes 3, of 3 fours 1; as long as was wanted, 12.
    bleu = 100 * math.exp(sum(map(math.log, (8 / 12, 5 / 9, 3 / 6, 1 / 3))) / 4)
    assert found.metrics["bleu"] == pytest.approx(bleu)
    assert [error.question for error in found.errors] == ["c", "a"], "the worst first"
    assert found.errors[0].reference == "nothing alike"
    assert found.errors[0].answer == "other words here"


async def test_every_question_is_asked_as_any_client_does():
    asked = questions(*[(f"say {letter}", "") for letter in "abcdefghij" * 5])
    async with kit() as server, AsyncClient(server.url) as client:
        assert (await served(client, MODEL)).max_model_len == 512
        found = await ask(client, MODEL, asked, 9)
        with pytest.raises(ConfigError, match=f"the server has {MODEL}, not mood@2"):
            await served(client, "mood@2")
        too_long = questions(("fine", ""), ("x" * 600, ""))
        with pytest.raises(InvalidRequest, match=f"^question 2, '{'x' * 80}': "):
            await ask(client, MODEL, too_long, 9)
    for question, answer in zip(asked, found, strict=True):
        ids = token_ids(f"user: {question.messages[0]['content']}\nassistant: ")
        assert answer == answer_to(ids, 0, 9)[0].strip()


async def test_the_command_tells_them_and_keeps_nothing_of_what_is_no_version(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FASTSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTSERVE_API_KEY", "k")
    path = tmp_path / "pairs.csv"
    path.write_text("question,answer\nsay a,bread and butter\n")
    async with kit(ServerConfig(api_keys=("k",))) as server:
        given = {"server": server.url, "max_tokens": 9}
        for as_json in (True, False):
            await asyncio.to_thread(evaluate, MODEL, path, **given, json=as_json)
        with pytest.raises(ConfigError, match="not other"):
            await asyncio.to_thread(evaluate, "other", path, **given)
    for data, tasks in ((None, ""), (path, "letters")):
        with pytest.raises(ConfigError, match="name what to measure with"):
            evaluate(MODEL, data, tasks=tasks)
    said, _, shown = capsys.readouterr().out.partition("\n")
    found = json.loads(said)
    assert found["metrics"]["questions"] == 1
    assert found["errors"][0]["reference"] == "bread and butter"
    assert "wanted bread and butter" in shown
    assert not (tmp_path / "registry").exists()


async def test_what_was_loaded_anew_meanwhile_is_not_kept(tmp_path, monkeypatch):
    path, real = tmp_path / "pairs.csv", measured.ask
    path.write_text("question,answer\nsay a,bread and butter\n")
    async with kit() as server:

        async def swapped(*given):
            (before,) = server.state.entries
            server.state.put(replace(before, created=before.created + 5))
            return await real(*given)

        monkeypatch.setattr(measured, "ask", swapped)
        given = (MODEL, path, server.url, None, 9, True, tmp_path)
        with pytest.raises(ConfigError, match="loaded anew while it was measured"):
            await asyncio.to_thread(measured.run_answers, *given)


TASK = """
task: letters
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


def expected(prompt, ending):
    """What the device says of an ending behind a prompt, as tests.fakes has it."""
    chain, total = _START, 0.0
    _, *ids = token_ids(prompt + ending)  # lm-eval puts nothing in front
    for at, token in enumerate(ids):
        if at >= len(ids) - len(ending):
            total += score(chain, token)
        chain = link(chain, token)
    return total


async def test_tasks_are_kept_with_the_version_that_is_served(tmp_path, monkeypatch, capsys):
    choices = [" ab", " cd", " ef"]
    right = [max(range(3), key=lambda i: expected(t, choices[i])) for t in ("one", "two", "three")]
    labels = [right[0], right[1], (right[2] + 1) % 3]
    docs = [
        {"text": text, "choices": choices, "label": label}
        for text, label in zip(("one", "two", "three"), labels, strict=True)
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "letters.yaml").write_text(TASK.format(data=data))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_model(tmp_path / "model", FAMILIES["llama"], {"embed.weight": np.zeros((4, 4))})
    registry = Registry(tmp_path / REGISTRY)
    version = registry.add("mood", tmp_path / "model", "train")
    monkeypatch.setattr("tests.server.kit.MODEL", "mood@1")
    asked = Harness("letters", tmp_path)
    async with kit(ServerConfig(api_keys=("k",))) as server:
        given = (asked, server.url, "k", False, tmp_path)
        await asyncio.to_thread(measured.run_tasks, "mood", *given)
        (kept,) = registry.notes(version)
        assert kept["letters/acc"] == pytest.approx(2 / 3)
        assert (kept["tasks"], kept["limit"]) == ("letters", None)
        assert "letters/acc" in capsys.readouterr().out
        registry.promote(str(registry.add("mood", tmp_path / "model", "train")))
        with pytest.raises(ConfigError, match="the server has mood@1, not mood@2"):
            await asyncio.to_thread(measured.run_tasks, "mood", *given)
        monkeypatch.setattr("fastserve_jax.lifecycle.harness.sys.executable", "false")
        with pytest.raises(ConfigError, match="lm-eval failed: 1"):
            await asyncio.to_thread(measured.run_tasks, "mood@1", *given)
    assert len(registry.notes(version)) == 1
    show_version("mood@1", tmp_path)
    assert "letters/acc 0.6667" in capsys.readouterr().out


def test_questions_are_read_as_training_reads_them(tmp_path):
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "p", "completion": "c"}\n')
    found, mark = read_questions(path)
    assert found[0] == Question(tuple(messages[:2]), "Hello!")
    assert (found[1].messages[0]["content"], found[1].reference) == ("p", "c")
    assert len(mark) == 16
    for line in ({"text": "plain"}, {"messages": messages[:2]}):
        path.write_text(json.dumps(line))
        with pytest.raises(DataError, match="no answer to compare with"):
            read_questions(path)
    path.write_text("")
    with pytest.raises(DataError, match="no questions"):
        read_questions(path)
