"""A step's numbers on several devices are those on one, where it could go wrong, in a process that
has four CPU devices. That every family says the same is tests/serve/test_devices.py's."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.parts import Parts
from tests.models.families import FAMILIES


@pytest.fixture(scope="module")
def on_mesh():
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.on_mesh"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["model"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("family", ["odd_vocabulary", "wide", "wide_by_two"])
def test_the_same_on_a_mesh_as_on_one_device(on_mesh, family):
    line = on_mesh[family]
    assert line["divided"] >= 4 * 2, "nothing was divided"
    assert line["apart"] < 1e-5 * line["scale"]
    assert line["same_tokens"]


@pytest.mark.parametrize("count", [4, 5, 12])
def test_what_does_not_divide_is_refused(count):
    with pytest.raises(ConfigError, match=rf"do not divide among {count} devices"):
        Parts(count).of(FAMILIES["llama"])


def test_a_kv_head_may_be_on_several_devices_and_no_device_without_one():
    own = Parts(6).of(replace(FAMILIES["qwen2"], intermediate_size=96))
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (1, 1, 16)
    assert own.vocab_size == 97, "a vocabulary that does not divide stays whole"
