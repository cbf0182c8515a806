"""Two hosts as people start them: what clients and orchestrators see when one is gone."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager

import aiohttp
import pytest

from fastserve_jax.errors import GroupLost
from tests.ports import free_port

MOST_S = 20.0  # from a loss to the end of every host
STREAMS = 32
FLAGS = ["--dtype", "f32", "--max-slots", "8", "--max-context", "256", "--mesh", "model=2"]
FLAGS += ["--set", "engine.step_tokens=16", "--set", "engine.speculate=off"]  # fewer programs


class Host:
    def __init__(self, process, log):
        self.process, self._log = process, log

    @property
    def said(self):
        return self._log.read_text()


@contextmanager
def two_hosts(model, folder, cache, address="127.0.0.1", inside=([], [])):
    """Started, the leader ready at the given address; killed at the end if they are still there.
    `inside` are commands that run each where it is to be."""
    coordinator, port = f"{address}:{free_port()}", free_port()
    environment = {**os.environ, "FASTSERVE_CACHE": str(cache), "COLUMNS": "400"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "fastserve_jax", "serve", str(model), *FLAGS]
    command += ["--cpu-devices", "1", "--host", address, "--port", str(port)]
    command += ["--num-hosts", "2", "--coordinator", coordinator]
    with ExitStack() as ending:
        hosts = []
        for own in (0, 1):
            log = folder / f"host{own}.log"
            process = subprocess.Popen(
                [*inside[own], *command, "--host-id", str(own)],
                stdout=ending.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            ending.callback(process.wait)
            ending.callback(process.kill)
            hosts.append(Host(process, log))
        until(lambda: "Ready in" in hosts[0].said, hosts, 300)
        yield f"http://{address}:{port}", hosts


def until(happens, hosts, seconds):
    end = time.monotonic() + seconds
    while not happens():
        said = [host.said for host in hosts]
        assert time.monotonic() < end, said
        assert all(host.process.poll() is None for host in hosts), said
        time.sleep(0.1)


def ask(url, text="Once upon a time", **more):
    body = {"prompt": text, "max_tokens": 12, "temperature": 0} | more
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


async def in_the_middle(url, happens):
    """What every one of many streams ended with, and how long after `happens` was called."""
    begun = asyncio.Event()

    async def one(session, number):
        body = {"prompt": f"One day {number}", "max_tokens": 240, "stream": True}
        body["logit_bias"] = {"1": -100, "2": -100}  # none of them ends by itself
        lines = []
        try:
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                async for line in answer.content:
                    lines += [line] if line.strip() else []
                    if len(lines) == 20:
                        begun.set()
        except aiohttp.ClientError as error:
            lines.append(type(error).__name__.encode())
        return lines[-1], time.monotonic()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        streams = [asyncio.create_task(one(session, number)) for number in range(STREAMS)]
        async with asyncio.timeout(30):
            await begun.wait()
        assert not any(stream.done() for stream in streams)
        began = time.monotonic()
        happens()
        ends = await asyncio.gather(*streams)
    return [last for last, _ in ends], max(at for _, at in ends) - began


def ended(host, within_s=MOST_S):
    try:
        return host.process.wait(within_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it hangs: {host.said}") from None


@pytest.fixture(scope="module")
def model(shared):
    return shared("models/stories260K.gguf")


def test_a_follower_is_killed_in_the_middle_of_streams(model, tmp_path, cache):
    with two_hosts(model, tmp_path, cache) as (url, (leader, follower)):
        assert ask(url).startswith(", there was a little girl named")
        lasts, elapsed_s = asyncio.run(in_the_middle(url, follower.process.kill))
        assert elapsed_s < MOST_S
        for last in lasts:
            assert b'"code":"engine_failed"' in last, last
            assert b"[DONE]" not in last
        assert ended(leader) == GroupLost.exit_status
    assert "the group is at its end: host 1: it closed the connection" in leader.said


def test_a_leader_is_killed_in_the_middle_of_streams(model, tmp_path, cache):
    with two_hosts(model, tmp_path, cache) as (url, (leader, follower)):
        lasts, elapsed_s = asyncio.run(in_the_middle(url, leader.process.kill))
        assert elapsed_s < MOST_S
        assert all(b"[DONE]" not in last for last in lasts), "cut off, and says that it is done"
        assert ended(follower) == GroupLost.exit_status
    assert "the group is at its end: host 0: it closed the connection" in follower.said


def test_a_signal_to_either_ends_both_in_order(model, tmp_path, cache):
    with two_hosts(model, tmp_path, cache) as (_, (leader, follower)):
        follower.process.send_signal(signal.SIGTERM)
        assert ended(leader) == 0
        assert ended(follower) == 0
    assert "host 1 was asked to stop: the group stops" in leader.said
    assert "at its end" not in leader.said + follower.said


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def linked():
    """Two network namespaces with a cable between them: how to run in each, and how to cut it."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    one, other = (f"fastserve{os.getpid()}{side}" for side in "ab")
    with ExitStack() as undo:
        for name in (one, other):
            try:
                run("ip", "netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be had: {error.stderr.decode().strip()}")
            undo.callback(run, "ip", "netns", "del", name)
        ends = f"v{os.getpid()}a", f"v{os.getpid()}b"
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip((one, other), ends, strict=True), 1):
            run("ip", "link", "set", end, "netns", name)
            within = ("ip", "-n", name)
            run(*within, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            run(*within, "link", "set", end, "up")
            run(*within, "link", "set", "lo", "up")
        # Their own names, too, which are their addresses: by these gloo finds them.
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        inside = [
            ["ip", "netns", "exec", name, *named, f"10.77.0.{number}"]
            for number, name in enumerate((one, other), 1)
        ]
        yield inside, lambda: run("ip", "-n", other, "link", "set", ends[1], "down")


def test_a_cut_link_is_noticed(model, tmp_path, cache, linked):
    inside, cut = linked
    with two_hosts(model, tmp_path, cache, "10.77.0.1", inside) as (url, hosts):
        code = f"import tests.serve.test_hosts as t; print(t.ask({url!r}))"
        asked = [*inside[1], sys.executable, "-c", code]
        out = subprocess.run(asked, check=True, capture_output=True, text=True)
        assert out.stdout.startswith(", there was a little girl named")
        began = time.monotonic()
        cut()
        assert [ended(host) for host in hosts] == [GroupLost.exit_status] * 2
        assert time.monotonic() - began < MOST_S
    for host, other in zip(hosts, (1, 0), strict=True):
        assert f"at its end: host {other}: nothing came from it for 8 s" in host.said
