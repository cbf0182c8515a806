"""A fleet on Ray as people start it: a replica killed in the middle of streams is replaced, and no
accepted request ends without a word."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import aiohttp
import pytest

from tests.ports import free_port

STREAMS, BEGUN = 32, 14  # of 16 slots
MOST_S = 120.0  # until a killed replica serves again: most of it is its start
SETS = ("model.dtype=f32", "engine.max_slots=8", "engine.max_context=256")
SETS += ("engine.step_tokens=16", "engine.speculate=off", "mesh.cpu_devices=1")  # fewer programs


class Fleet:
    def __init__(self, url, process, log):
        self.url, self.process, self._log = url, process, log

    @property
    def said(self):
        return self._log.read_text()

    def ready(self):
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return json.loads(answer.read())["replicas"]
        except (urllib.error.URLError, OSError):
            return 0

    def until(self, happens, seconds):
        end = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < end, self.said[-4000:]
            assert self.process.poll() is None, self.said[-4000:]
            time.sleep(0.2)

    def hosts(self):
        """Processes of Ray's that serve, of this fleet."""
        listed = subprocess.run(
            ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
        )
        found = re.findall(r"^ *(\d+) +(\d+) (.*)$", listed.stdout, re.M)
        above = {int(pid): int(parent) for pid, parent, _ in found}

        def is_ours(pid):
            while pid and pid != self.process.pid:
                pid = above.get(pid)
            return bool(pid)

        hosts = [int(pid) for pid, _, args in found if args.startswith("ray::Host")]
        return [pid for pid in hosts if is_ours(pid)]


@contextmanager
def started(model, folder, cache, *flags):
    log, port = folder / "fleet.log", free_port()
    sets = [flag for name in SETS for flag in ("--set", name)]
    environment = {**os.environ, "FASTSERVE_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    environment |= {"COLUMNS": "300", "RAY_TMPDIR": "/tmp"}  # a socket's path must be short
    command = [sys.executable, "-m", "fastserve_jax", "fleet", str(model), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *flags, *sets], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    fleet = Fleet(f"http://127.0.0.1:{port}", process, log)
    try:
        yield fleet
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, fleet.said[-4000:]
    finally:
        process.kill()
        process.wait()


async def streams(url, happens):
    """What each of many streams came to, while `happens` in their middle: when nearly all slots of
    both replicas are taken."""
    begun, middle = set(), asyncio.Event()

    async def one(session, number):
        body = {"prompt": f"One day {number}", "max_tokens": 240, "stream": True}
        body["logit_bias"] = {"1": -100, "2": -100}
        lines = []
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                lines += [line] if line.strip() else []
                begun.add(number)
                if len(begun) >= BEGUN:
                    middle.set()
            return answer.status, lines

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        tasks = [asyncio.create_task(one(session, number)) for number in range(STREAMS)]
        await middle.wait()
        happens()
        return await asyncio.gather(*tasks)


def complete(url):
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


@pytest.fixture
def model(shared):
    return shared("models/stories260K.gguf")


def test_a_replica_is_killed_in_the_middle_of_streams(model, tmp_path):
    with started(model, tmp_path, tmp_path / "cache", "--replicas", "2") as fleet:
        fleet.until(lambda: fleet.ready() == 2, 180)
        assert complete(fleet.url).startswith(", there was a little girl named")
        assert len(fleet.hosts()) == 2
        victim = fleet.hosts()[0]
        ends = asyncio.run(streams(fleet.url, lambda: os.kill(victim, signal.SIGKILL)))
        finished = [lines for _, lines in ends if lines[-1].strip() == b"data: [DONE]"]
        lost = [lines for _, lines in ends if b'"code":"replica_lost"' in lines[-1]]
        assert len(finished) + len(lost) == STREAMS, "one ended without a word"
        assert len(lost) > 0, "nobody was in the middle of anything"
        assert len(finished) >= STREAMS // 4, "the other replica's did not go on"
        began = time.monotonic()
        assert complete(fleet.url).startswith(", there was a little girl named")
        fleet.until(lambda: fleet.ready() == 2, MOST_S)
        print(f"serves by two again after {time.monotonic() - began:.0f} s")
        assert victim not in fleet.hosts()
        assert len(fleet.hosts()) == 2
        frozen = fleet.hosts()[0]
        os.kill(frozen, signal.SIGSTOP)
        fleet.until(lambda: "does not answer" in fleet.said, 60)
        assert complete(fleet.url).startswith(", there was a little girl named")
        fleet.until(lambda: fleet.ready() == 2, MOST_S)
        assert frozen not in fleet.hosts()
    assert "is gone" in fleet.said


def test_a_model_that_is_none_is_said_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastserve_jax", "fleet", str(tmp_path / "none.gguf")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no model" in done.stderr


def test_what_a_person_must_mend_ends_it(model, tmp_path):
    sets = ("--set", "engine.policy=none-such", "--set", "mesh.cpu_devices=1")
    done = subprocess.run(
        [sys.executable, "-m", "fastserve_jax", "fleet", str(model), "--port", "0", *sets],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    assert "none-such" in done.stderr.splitlines()[-1]


def test_a_replica_of_two_hosts_starts_again_as_a_whole(model, tmp_path):
    flags = ("--replicas", "1", "--hosts", "2")
    with started(model, tmp_path, tmp_path / "cache", *flags) as fleet:
        fleet.until(lambda: fleet.ready() == 1, 180)
        assert complete(fleet.url).startswith(", there was a little girl named")
        before = fleet.hosts()
        assert len(before) == 2
        os.kill(before[1], signal.SIGKILL)
        fleet.until(lambda: fleet.ready() == 0, 30)
        fleet.until(lambda: fleet.ready() == 1, MOST_S)
        assert complete(fleet.url).startswith(", there was a little girl named")
        assert not set(before) & set(fleet.hosts()), "all of it, not the one that was killed"
