"""bench/compare.py against fake servers: what it sends, what it counts, how it fails."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fake_server import Fake, listening

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_server.py")


async def compare(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "bench/compare.py", *arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 30)
    except TimeoutError:
        process.terminate()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def sent(fake: Fake, tokens: int) -> list[dict[str, Any]]:
    return [body for body in fake.asked if body["max_tokens"] == tokens]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def test_both_get_exact_and_different_prompts_and_rows_say_what_usage_says(tmp_path: Path):
    ours, peer = Fake(chunk_s=0.002), Fake("llama", hidden_tokens=1, chunk_s=0.01)
    out = tmp_path / "rows.json"
    async with listening(ours) as a, listening(peer) as b:
        arguments = ("--points", "1,4", "--in", "12", "--out", "6", "--rounds", "2", "--rate", "80")
        status, printed, err = await compare(
            *("--ours", a, "--peer", f"{b}/v1", *arguments, "--requests", "5", "--prefill", "40"),
            *("--json", str(out)),
        )
    assert status == 0, err
    told = json.loads(out.read_text())
    for fake, seen in ((ours, 12), (peer, 11)):
        bodies = sent(fake, 6)
        assert len(bodies) == 2 * 3 * (5 + 1)  # rounds, points, requests and one to warm up
        assert {fake.count(body["prompt"]) for body in bodies} == {seen}
        texts = [body["prompt"] for body in bodies]
        assert len(set(texts)) == len(texts)
        assert len({text[:20] for text in texts}) > len(texts) * 0.9  # no common beginnings
        assert fake.most_running >= 4
        assert bodies[0] | {"prompt": ""} == {
            "model": "fake",
            "prompt": "",
            "max_tokens": 6,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    rows = told["rows"]
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        is_prefill = row["point"] == "prefill 40"
        assert row["input_tokens"] == (40 if is_prefill else 12)
        assert row["output_tokens"] == (1 if is_prefill else 6)
        counted = 5 * (row["input_tokens"] if is_prefill else row["output_tokens"])
        assert row["tokens_per_s"] == pytest.approx(counted / row["elapsed_s"])
        assert row["ttft_p50_s"] <= row["ttft_p95_s"] < 1
        assert (row["itl_p50_s"] is None) == is_prefill
    alone = told["summary"]["points"]["1 clients"]
    assert alone["peer"]["itl_p50_s"] > 0.007
    low, high = alone["ratio_range"]
    assert low <= alone["ratio"] <= high
    assert alone["ratio"] > 1.1  # ours waits a fifth as long for a token
    assert told["summary"]["start_s"] == {"ours": None, "peer": None}
    assert "note" not in printed


async def test_rules_stand_instead_of_temperature_0():
    fake = Fake(chunk_s=0.001)
    rules = {"temperature": 1.0, "top_k": 64}
    async with listening(fake) as url:
        asked = ("--ours", url, "--points", "1", "--rounds", "1", "--requests", "2")
        status, _, err = await compare(*asked, "--rules", json.dumps(rules))
    assert status == 0, err
    assert all(body | rules == body for body in sent(fake, 64))
    assert len(sent(fake, 64)) == 3


async def test_only_one_server_is_loaded_at_a_time_and_the_first_changes_by_round(tmp_path: Path):
    ours, peer, together = Fake(chunk_s=0.002), Fake(chunk_s=0.002), []

    def seen(this: Fake, other: Fake) -> Any:
        real = this.stream

        async def stream(*arguments: Any) -> Any:
            together.append(other.running)
            return await real(*arguments)

        return stream

    ours.stream, peer.stream = seen(ours, peer), seen(peer, ours)  # type: ignore[method-assign]
    out = tmp_path / "rows.json"
    async with listening(ours) as a, listening(peer) as b:
        status, _, err = await compare(
            *("--ours", a, "--peer", b, "--points", "2", "--in", "8", "--out", "3"),
            *("--rounds", "3", "--json", str(out)),
        )
    assert status == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert [row["server"] for row in rows] == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert set(together) == {0}


async def test_tokens_are_counted_by_usage_and_chunks_of_several_are_noted():
    ours = Fake(chunk_tokens=3)
    async with listening(ours) as a:
        status, printed, err = await compare(
            "--ours", a, "--points", "1", "--in", "10", "--out", "6", "--rounds", "1"
        )
    assert status == 0, err
    assert len(set(ours.clients)) == len(ours.clients)  # llama.cpp hangs up after each
    assert "note: ours sends 3.00 tokens a chunk" in printed
    assert "counts" not in printed


async def test_without_tokenize_prompts_are_fitted_by_usage_but_never_sent_before():
    ours = Fake("none")
    async with listening(ours) as a:
        status, printed, err = await compare(
            "--ours", a, "--points", "1", "--in", "10", "--out", "6", "--rounds", "1"
        )
    assert status == 0, err
    bodies = sent(ours, 6)
    assert {ours.count(body["prompt"]) for body in bodies} == {10}
    assert not {body["prompt"] for body in bodies} & {body["prompt"] for body in sent(ours, 1)}
    assert "note" not in printed


async def test_a_size_no_prompt_can_have_is_noted():
    async with listening(Fake(hidden_tokens=7)) as a:
        status, printed, err = await compare(
            "--ours", a, "--points", "1", "--in", "4", "--out", "2", "--rounds", "1"
        )
    assert status == 0, err
    assert "note: ours counts" in printed
    assert "not 4 and 2" in printed


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (Fake(fails="error", spares=3), "failed in mid-stream: {'message': 'out of\\nmemory'}"),
        (Fake(fails="close", spares=3), "after 2 chunks"),
        (Fake(fails="short", spares=3), "the stream ended after 2 chunks without [DONE]"),
        (Fake(usage=False), "sends no usage in its stream"),
    ],
    ids=["error", "close", "short", "no usage"],
)
async def test_a_stream_that_breaks_off_is_one_clear_line(fake: Fake, said: str):
    async with listening(fake) as a:
        status, _, err = await compare(
            "--ours", a, "--points", "2", "--in", "8", "--out", "6", "--rounds", "1"
        )
    assert status == 1
    assert err.startswith(f"compare: ours ({a}): ")
    assert said in err
    assert err.count("\n") == 1


async def test_nobody_there_is_one_clear_line():
    status, _, err = await compare("--ours", f"http://127.0.0.1:{free_port()}", "--points", "1")
    assert status == 1
    assert err.startswith("compare: ours (http://127.0.0.1:")
    assert err.count("\n") == 1


async def test_a_command_is_started_timed_and_stopped_for_each_round(tmp_path: Path):
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    commands = [f"'{sys.executable}' '{FAKE}' {url.rpartition(':')[2]}" for url in urls]
    out = tmp_path / "rows.json"
    status, printed, err = await compare(
        *("--ours", urls[0], "--peer", urls[1], "--exclusive", "--points", "1", "--rounds", "2"),
        *("--ours-command", commands[0], "--peer-command", commands[1]),
        *("--in", "8", "--out", "2", "--json", str(out)),
    )
    assert status == 0, err
    told = json.loads(out.read_text())
    assert [row["server"] for row in told["rows"]] == ["ours", "peer", "peer", "ours"]
    for name in ("ours", "peer"):
        assert 0 < told["summary"]["start_s"][name] < 20
        if sys.platform == "linux":
            assert told["summary"]["peak_memory_bytes"][name] > 1e6
        assert f"{name}: ready " in printed
    for url in urls:
        with pytest.raises(OSError, match=r"."):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1).close()


async def test_a_command_that_ends_early_says_its_last_line():
    url = f"http://127.0.0.1:{free_port()}"
    command = f"""'{sys.executable}' -c 'import sys; sys.exit("no such model")'"""
    status, _, err = await compare("--ours", url, "--ours-command", command)
    assert status == 1
    assert err == "compare: ours: ended with status 1 before it was ready: no such model\n"


async def test_a_port_that_is_taken_is_not_measured_by_mistake():
    fake = Fake()
    async with listening(fake) as a:
        status, _, err = await compare("--ours", a, "--ours-command", "true")
    assert (status, fake.asked) == (1, [])
    assert err == f"compare: ours: something else answers at {a} already\n"
