"""The commands as a person types them: exit status, one-line errors, output on the right stream."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.serve.conftest import SMALL, started

STORY = "Once upon a time, there was a little girl named Lily."


def fastserve(*words, cache=None, **options):
    environment = {**os.environ, "COLUMNS": "200"}
    if cache is not None:
        environment["FASTSERVE_CACHE"] = str(cache)
    command = [sys.executable, "-m", "fastserve_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve", "nothing-like-it"), "no model 'nothing-like-it'"),
        (("serve", "smollm2-135m-instrct"), "smollm2-135m-instruct"),
        (("serve", "--set", "engine.max_slot=2"), "did you mean engine.max_slots"),
        (("serve", "--config", "/no/such.toml"), "/no/such.toml"),
        (("serve", "--policy", "best"), "fcfs, mlfq"),
        (("serve", "--dtype", "fp4"), "auto, bf16, int8, f32"),
        (("pull", "nothing-like-it"), "the catalogue has"),
    ],
)
def test_operator_errors_are_one_line(words, said, tmp_path):
    ran = fastserve(*words, cache=tmp_path)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_an_address_in_use_is_said_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = fastserve("serve", "--port", port, cache=tmp_path)
    assert ran.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ran.stderr
    assert "--port" in ran.stderr


def test_a_model_that_does_not_fit_says_what_would(shared, tmp_path):
    path = shared("models/stories260K.gguf")
    ran = fastserve("serve", path, "--port", "0", "--set", "kv.pages=99999999", cache=tmp_path)
    assert ran.returncode == 2
    assert "--set kv.pages=" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    ran = fastserve("serve", tmp_path / "x.gguf", "--port", "0", cache=tmp_path / "cache")
    assert ran.returncode == 2
    assert "x.gguf" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_models_and_doctor(tmp_path):
    listed = fastserve("models", cache=tmp_path)
    assert listed.returncode == 0
    for name in ("smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b-instruct"):
        assert name in listed.stdout
    checked = fastserve("doctor", cache=tmp_path)
    assert checked.returncode == 0
    assert "cpu device" in checked.stdout
    assert str(tmp_path) in checked.stdout


def test_generate_writes_the_text_and_only_that(shared, cache):
    path = shared("models/stories260K.gguf")
    words = ("generate", "Once upon a time", path, "--max-tokens", "30", "--dtype", "f32")
    ran = fastserve(*words, cache=cache)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Once upon a time, there was a little girl")
    assert "compiled" in ran.stderr


def test_chat_answers_until_an_empty_line(shared, cache):
    path = shared("models/stories260K.gguf")
    words = ("chat", path, "--max-tokens", "12", "--temperature", "0", "--dtype", "f32")
    ran = fastserve(*words, cache=cache, input="Hello\nAnd then?\n\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("> ") == 3
    assert len(ran.stdout) > 20


def post(url, body):
    asked = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def ready_status(server):
    try:
        with urllib.request.urlopen(f"{server.url}/ready", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except (urllib.error.URLError, ConnectionError):
        return None


def test_sigterm_finishes_what_was_accepted(shared, cache):
    sets = [flag for name in SMALL for flag in ("--set", name)]
    with started(shared("models/stories260K.gguf"), cache, *sets) as server:
        answers = []
        body = {"prompt": STORY, "max_tokens": 200, "temperature": 0}
        asking = threading.Thread(
            target=lambda: answers.append(post(f"{server.url}/v1/completions", body))
        )
        asking.start()
        while server.metric("num_requests_running") == 0:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        while (status := ready_status(server)) == 200:
            time.sleep(0.005)
        assert status in (503, None)  # None: it had finished already
        asking.join(60)
        assert answers[0]["usage"]["completion_tokens"] == 200
        server.process.wait(60)  # a second signal would end it at once
    assert server.process.returncode == 0


def test_stopping_while_loading_is_quick_and_quiet(shared, tmp_path):
    command = [sys.executable, "-m", "fastserve_jax", "serve"]
    command += [str(shared("models/stories260K.gguf")), "--port", "0"]
    environment = {**os.environ, "FASTSERVE_CACHE": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert "stories260K" in process.stderr.readline()  # opened; now it compiles
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "stopped while loading" in rest
    assert "Traceback" not in rest
