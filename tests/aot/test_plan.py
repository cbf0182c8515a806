"""`fastserve plan`: the whole step of large models by the chips' compilers, without weights."""

import json
import os
import subprocess
import sys

import pytest

from fastserve_jax.chips import ENVIRONMENT
from tests.aot.test_chips import of

pytestmark = pytest.mark.aot

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
SIZES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
}


def plan(folder, model, *arguments):
    path = folder / f"{model}.json"
    path.write_text(json.dumps(LLAMA3 | SIZES[model]))
    return subprocess.run(
        [sys.executable, "-m", "fastserve_jax", "plan", str(path), *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def planned(folder, model, chip, *arguments):
    done = plan(folder, model, "--chip", chip, "--json", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = {step["program"]: step for step in json.loads(done.stdout)}
    assert set(steps) == {"decode", "mixed"}
    return steps


LARGE = ("llama-3-70b", "mixtral-8x7b")
PODS = ("v5e:4x4", "v5e:8x8", "v6e:16x16", "v5e:4x4*2")
WANTED = [("llama-3-8b", "v5e:2x2"), *((model, pod) for model in LARGE for pod in PODS)]
LIKE_ANOTHER = [(LARGE[0], PODS[0]), (LARGE[0], PODS[1]), (LARGE[1], PODS[2]), (LARGE[1], PODS[3])]
ON_GPUS = [("llama-3-8b", "h100"), *((model, "h100x8") for model in LARGE)]


def where():
    """A pod that is like another takes minutes more: `make pods`."""
    for found in of("tpu", WANTED) + of("gpu", ON_GPUS):
        marks = [*found.marks, *([pytest.mark.pods] if found.values[0] in LIKE_ANOTHER else [])]
        yield pytest.param(*found.values, marks=marks, id="-".join(found.values[0]))


@pytest.mark.parametrize("where", list(where()))
def test_the_step_fits_and_is_what_it_was_meant_to_be(tmp_path, where):
    model, chip = where
    layers = SIZES[model]["num_hidden_layers"]
    for name, step in planned(tmp_path, model, chip).items():
        assert step["fits"]
        assert step["peak_bytes"] <= step["memory_bytes"]
        assert step["alias_bytes"] == step["kv_cache_bytes"], "pages are copied"
        assert step["host_temp_bytes"] == 0
        assert step["kernels"] >= layers
        if step["mesh"]["model"] * step["mesh"]["expert"] > 1:
            # After attention and after the MLP; and of the embedding, which is divided.
            assert step["collectives"] == {"all-reduce": 2 * layers + 1}
            # Logits twice, for the best and for a draw; and four arrays of what was drawn.
            told = 4 if step["mesh"]["data"] > 1 else 0
            assert sum(step["drawing_collectives"].values()) <= 2 + told
        else:
            assert step["collectives"] == {}
        if name == "decode":
            assert step["temp_bytes"] <= 0.02 * step["argument_bytes"]
            assert [e["batch"] for e in step["step"]] == sorted(e["batch"] for e in step["step"])
            for estimate in step["step"]:
                rate = estimate["batch"] / estimate["floor_s"]
                assert estimate["tokens_per_s"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("chip", of("tpu", ["v5e:1x1"]) + of("gpu", ["h100"]))
def test_what_does_not_fit_says_by_how_much(tmp_path, chip):
    for step in planned(tmp_path, "llama-3-70b", chip).values():
        assert not step["fits"]
        assert step["weight_bytes"] == pytest.approx(2 * 70.6e9, rel=0.01)
        assert step["peak_bytes"] > step["memory_bytes"]
        assert "weights 131" in step["why_not"]
    shown = plan(tmp_path, "llama-3-70b", "--chip", chip)
    assert "does not fit" in shown.stdout
    assert "too much" in shown.stdout


@pytest.mark.parametrize("chip", of("tpu", ["v5e:2x2"]) + of("gpu", ["h100x4"]))
def test_a_mesh_that_cannot_be_is_refused(tmp_path, chip):
    for mesh, why in {
        "model=3": "32 heads",
        "model=2,data=1": "4 devices",
        "rows=2": "no axis",
    }.items():
        done = plan(tmp_path, "llama-3-8b", "--chip", chip, "--mesh", mesh)
        assert done.returncode == 2
        assert why in done.stderr


def test_a_chip_that_is_none_is_said_so(tmp_path):
    done = plan(tmp_path, "llama-3-8b", "--chip", "h900")
    assert done.returncode == 2
    assert "no chip 'h900' is known" in done.stderr
