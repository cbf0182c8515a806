"""The same tokens on several devices and on several hosts as on one device, for every family, with
preemption, swapping and steps that overlap."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import compress

import numpy as np
import pytest

from fastserve_jax.weights.load import open_gguf
from fastserve_jax.weights.orbax import write_model
from tests.ports import free_port
from tests.weights import synthetic

DENSE = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
FAMILIES = (*DENSE, *synthetic.WITH_EXPERTS)
GREEDY = [number % 3 for number in range(1, 13)]  # of on_devices.requests
SOME = ("llama", "mixtral")
LIKE_OTHERS = pytest.mark.skipif(
    "not config.getoption('-m')", reason="its like is among the rest: make aot runs it, too"
)
MESHES = {  # devices, the mesh, and who is tried on it
    "two parts": (2, {"model": 2}, SOME),
    "two replicas of two parts": (4, {"data": 2, "model": 2}, SOME),
    "four parts, a KV head on two": (4, {"model": 4}, FAMILIES),
    "two groups of experts in two parts": (4, {"expert": 2, "model": 2}, synthetic.WITH_EXPERTS),
    "four groups of experts": (4, {"expert": 4}, synthetic.WITH_EXPERTS),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths by family: GGUF files, Hugging Face's folders and our own, by turns. Llama's head is a
    matrix of its own, and Qwen2's vocabulary does not divide."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for number, family in enumerate(FAMILIES):
        arrays = synthetic.parameters(family, seed=number, tied=family != "llama")
        vocab_size = synthetic.VOCAB + (family == "qwen2")
        arrays["embed.weight"] = np.resize(arrays["embed.weight"], (vocab_size, synthetic.HIDDEN))
        stored = synthetic.gguf_tensors(family, arrays)
        file = synthetic.write_gguf(folder / f"{family}.gguf", family, stored)
        if number % 3 == 1 and family != "gpt2":
            config = synthetic.folder_config(family, vocab_size=vocab_size)
            stored = synthetic.folder_tensors(family, arrays)
            made[family] = synthetic.write_folder(folder / family, config, stored, shards=2)
        elif number % 3 == 2:
            write_model(folder / family, open_gguf(file, family).config, arrays)
            made[family] = folder / family
        else:
            made[family] = file
    return {family: str(path) for family, path in made.items()}


@contextmanager
def started(models, cache, sets, member=(1, 0, "")):
    """Killed if it is still there at the end."""
    asked = {"sets": sets, "cache": str(cache)}
    asked |= dict(zip(("num_hosts", "host_id", "coordinator"), member, strict=True))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.serve.on_devices", json.dumps(asked), *models.values()],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {line["model"]: line for line in lines}


def on_one_host(models, cache, sets):
    with started(models, cache, sets) as process:
        return told(process)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(models, cache):
    return on_one_host(models, cache, [])


def meshed(devices, mesh):
    """Settings; what is not in `mesh` is one."""
    axes = {"data": 1, "expert": 1, "model": 1} | mesh
    return [f"mesh.cpu_devices={devices}", *(f"mesh.{axis}={size}" for axis, size in axes.items())]


@pytest.fixture(scope="module")
def replicas(models, cache):
    """The model whole on each of two devices. One CPU device alone draws by kernels of its own,
    other tokens than XLA; what is drawn is compared with this."""
    return on_one_host(models, cache, meshed(2, {"data": 2}))


def check(found, families, mesh):
    assert found.keys() == set(families)
    for line in found.values():
        assert line["mesh"] == (mesh and {"data": 1, "expert": 1, "model": 1} | mesh)
        assert line["preemptions"] > 0, "nobody was preempted"
        assert line["pages_out"] > 0, "nothing was swapped"


def greedy(line):
    return list(compress(line["tokens"], GREEDY))


def test_two_replicas_as_one_device(replicas, alone):
    check(alone, FAMILIES, None)
    check(replicas, FAMILIES, {"data": 2})
    for family, line in replicas.items():
        assert greedy(line) == greedy(alone[family]), family


def like_others(*given, name):
    return pytest.param(*given, id=name, marks=[LIKE_OTHERS, pytest.mark.aot])


SELDOM = ("two parts", "four groups of experts")
RUNS = [like_others(name, name=name) if name in SELDOM else name for name in MESHES]


@pytest.mark.parametrize("name", RUNS)
def test_on_several_devices_as_on_one(models, cache, replicas, name):
    devices, mesh, families = MESHES[name]
    some = {family: models[family] for family in families}
    found = on_one_host(some, cache, meshed(devices, mesh))
    check(found, families, mesh)
    for family, line in found.items():
        assert line["tokens"] == replicas[family]["tokens"], family


TWO = ("gemma3", "mixtral")
REST = tuple(family for family in FAMILIES if family not in TWO)


@pytest.mark.parametrize(
    ("mesh", "families"),
    [
        pytest.param({"model": 4}, TWO, id="parts"),
        # Our own folder first: hosts meet before any of them asks what devices there are.
        pytest.param({"data": 2, "model": 2}, SOME[1:], id="replicas"),
        like_others({"model": 4}, REST, name="parts of the rest"),
        like_others({"data": 2, "model": 2}, SOME[:1], name="replicas without experts"),
    ],
)
def test_on_two_hosts_as_on_one(models, cache, replicas, mesh, families):
    """Parts on both hosts; and each host a replica, whose tokens the other must be told."""
    some = {family: models[family] for family in families}
    coordinator = f"127.0.0.1:{free_port()}"
    sets = meshed(2, mesh)
    with (
        started(some, cache, sets, (2, 0, coordinator)) as leader,
        started(some, cache, sets, (2, 1, coordinator)) as follower,
    ):
        found = told(leader)
        assert told(follower) == {}
    check(found, families, mesh)
    for family, line in found.items():
        assert line["tokens"] == replicas[family]["tokens"], family
