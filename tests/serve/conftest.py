"""A server as people start it, in a process of its own, with a small real model."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

SMALL = (
    "model.dtype=f32",
    "engine.max_slots=8",
    "engine.step_tokens=64",
    "kv.pages=40",  # eight requests of eighty tokens are too many for it
    "kv.page_size=8",
)


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    process: subprocess.Popen

    def metric(self, name):
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            found = re.search(rf"^fastserve:{name}{{.*}} (\S+)$", answer.read().decode(), re.M)
        return float(found.group(1))


@contextmanager
def started(model, cache, *flags):
    """`fastserve serve` until it says that it is ready; ended by SIGTERM, with status 0."""
    command = [sys.executable, "-m", "fastserve_jax", "serve", str(model), "--port", "0", *flags]
    environment = {**os.environ, "FASTSERVE_CACHE": str(cache), "COLUMNS": "400"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = ""
        for line in process.stderr:
            said += line
            if ready := re.search(r"Ready in .*: (\S+) at (http://\S+)", line):
                break
        else:
            raise AssertionError(f"it did not start:\n{said}")
        try:
            yield Server(ready.group(2), ready.group(1), process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.stderr.read()
            status = process.wait(60)
        assert status == 0


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(shared, cache):
    """stories260K; one server for all tests that leave it as they found it."""
    sets = [flag for name in SMALL for flag in ("--set", name)]
    with started(shared("models/stories260K.gguf"), cache, *sets) as server:
        yield server
