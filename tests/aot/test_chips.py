"""Attention's cases by the real compilers of chips that are not here. `make aot` prints the table.

Needs the extra `aot` (half a gigabyte of compilers); each chip is compiled for in a process of its
own, because what a GPU's compiler cannot do ends the process.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fastserve_jax.chips import ENVIRONMENT, topology
from fastserve_jax.errors import ConfigError

TPUS = ("v4:2x2x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
GPUS = ("a100", "h100", "b200")
HAS = {
    "tpu": find_spec("libtpu") is not None,
    "gpu": find_spec("jax_plugins") is not None and find_spec("jax_plugins.xla_cuda12") is not None,
}
WITHOUT = "the compiler is not installed: make aot, or pip install '.[aot]'"
pytestmark = pytest.mark.aot


def of(platform, chips):
    skipped = pytest.mark.skipif(not HAS[platform], reason=WITHOUT)
    return [pytest.param(chip, marks=skipped) for chip in chips]


def compiled(chip, *only):
    """What was compiled for `chip`, as tests.aot.compile says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile", chip, *only],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("chip", of("tpu", TPUS) + of("gpu", GPUS))
def test_every_case_compiles_without_a_copy_of_the_pages(chip, record_property):
    lines = compiled(chip)
    record_property("compiled", lines)
    failed = [line for line in lines if "error" in line]
    assert not failed, "\n".join(f"{line['case']}: {line['error']}" for line in failed)
    assert len(lines) >= 67
    for line in lines:
        check(line, is_tpu=":" in chip)


def check(line, is_tpu):
    operation, *_ = line["case"].split()
    # A v4 has no products of integers: XLA's own is taken there.
    by_kernel = is_tpu and not (operation == "matmul" and line["chip"].startswith("v4"))
    assert line["kernels"] >= (2 if operation == "attention" else int(by_kernel)), line
    # A copy of pages would be as large; parts of sums are small.
    assert line["temp_bytes"] < max(0.6 * line["argument_bytes"], 16e6), line
    # Of weights that are scaled by stretch and meet many rows one is made, and read once.
    is_scaled = line["case"] == "matmul qwen3_prompt_int4" and not is_tpu
    assert line.get("wide_copies", 0) <= is_scaled, line
    if operation in ("scatter", "write"):
        assert line["alias_bytes"] > 0, line
        if is_tpu:
            assert line["temp_bytes"] < 0.1 * line["alias_bytes"], line
    if line["fast_bytes"] or operation == "attention":  # page copies take none
        assert 0 < line["fast_bytes"] < (16 << 20 if is_tpu else 227 << 10), line
    # A few words, not what it multiplies. None: the kernel was compiled for a case before.
    assert (line.get("spilled_bytes") or 0) <= 128, line


@pytest.mark.parametrize("chip", of("tpu", ["v5e:1x1"]) + of("gpu", ["h100"]))
def test_tiles_without_room_are_refused(chip):
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.wrong", chip],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("chip", of("tpu", ["v5e:3x3", "v5e:huge"]))
def test_a_topology_that_is_none_is_said_so(chip):
    with pytest.raises(ConfigError, match=f"no topology {chip}"):
        topology(chip)


@pytest.mark.parametrize("chip", ["", "v9:2x2", "h100y8", "x100", "v5e"])
def test_a_chip_that_is_none_is_said_so(chip):
    with pytest.raises(ConfigError, match=r"no chip .* is known: give a TPU with its topology"):
        topology(chip)
