"""A model is never whole anywhere: what each of four hosts ever has in memory, loading a GB."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.ports import free_port
from tests.serve.loading import HOSTS
from tests.weights import synthetic

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 5632,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 1.1 GB of bfloat16."""
    hidden, inner, heads = SIZES["hidden_size"], SIZES["intermediate_size"], 128
    queries, keys = heads * SIZES["num_attention_heads"], heads * SIZES["num_key_value_heads"]
    shapes = {"model.embed_tokens": (SIZES["vocab_size"], hidden), "model.norm": (hidden,)}
    for layer in range(SIZES["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    tensors = {
        f"{name}.weight": np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()
    }
    config = synthetic.folder_config("llama", **SIZES)
    return synthetic.write_folder(
        tmp_path_factory.mktemp("big") / "model", config, tensors, shards=4
    )


def test_no_host_holds_more_than_its_part_and_what_reading_takes(folder):
    coordinator = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "tests.serve.loading", str(folder)]
    hosts = [
        subprocess.Popen(
            [*command, str(host), coordinator],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(HOSTS)
    ]
    for host in hosts:
        out, _ = host.communicate(timeout=300)
        assert host.returncode == 0
        line = json.loads(out.splitlines()[-1])
        assert line["whole"] > 1e9
        assert line["whole"] / HOSTS <= line["held"] < 1.01 * line["whole"] / HOSTS
        print(f"{line['most'] / 1e6:.0f} MB at the most for {line['held'] / 1e6:.0f} MB")
        assert line["most"] <= 1.3 * line["held"] + 500e6
