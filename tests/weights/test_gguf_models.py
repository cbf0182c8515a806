"""GGUF models of every family: configuration, and parameters in the decoder's own order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig, RopeScaling
from fastserve_jax.weights.load import open_gguf
from tests.weights import synthetic

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe")


def _open(tmp_path: Path, family: str, **fields: Any) -> ModelConfig:
    tensors = synthetic.gguf_tensors(family, synthetic.parameters(family))
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    path = synthetic.write_gguf(tmp_path / "m.gguf", family, tensors, fields=fields)
    return open_gguf(path, "m").config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_come_back_as_they_were(tmp_path: Path, family: str, tied: bool) -> None:
    expected = synthetic.parameters(family, tied=tied)
    tensors = synthetic.gguf_tensors(family, expected)
    model = open_gguf(synthetic.write_gguf(tmp_path / "m.gguf", family, tensors), "m")
    assert model.config.tied_head is tied
    loaded = dict(model.tensors(synthetic.shapes_of(expected)))
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_quantised_parameters_come_back_in_place(tmp_path: Path, family: str) -> None:
    expected = synthetic.parameters(family)
    tensors = synthetic.gguf_tensors(family, expected)
    path = synthetic.write_gguf(
        tmp_path / "m.gguf", family, tensors, quantised=gguf.GGMLQuantizationType.Q8_0
    )
    for name, array in open_gguf(path, "m").tensors(synthetic.shapes_of(expected)):
        assert np.abs(array - expected[name]).max() < 0.03, name


def test_llama_config(tmp_path: Path) -> None:
    assert _open(tmp_path, "llama") == ModelConfig(
        family="llama",
        vocab_size=synthetic.VOCAB,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        max_context=128,
        norm_eps=pytest.approx(1e-5),
        rope_base=50_000.0,
    )


def test_families_differ_where_they_should(tmp_path: Path) -> None:
    qwen2, qwen3 = _open(tmp_path, "qwen2"), _open(tmp_path, "qwen3")
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)
    gpt2 = _open(tmp_path, "gpt2")
    assert gpt2.layer_norm
    assert gpt2.learned_positions
    assert gpt2.linear_bias
    assert gpt2.qkv_bias
    assert (gpt2.gated_mlp, gpt2.activation, gpt2.head_dim) == (False, "gelu_tanh", 16)


def test_gemma3_has_the_facts_that_its_file_leaves_out(tmp_path: Path) -> None:
    config = _open(tmp_path, "gemma3", block_count=12)
    assert config.windows == (16, 16, 16, 16, 16, 0, 16, 16, 16, 16, 16, 0)
    assert (config.rope_base, config.local_rope_base) == (50_000.0, 10_000.0)
    assert config.embedding_scale == math.sqrt(64)
    assert (config.qk_norm, config.sandwich_norms, config.activation) == (True, True, "gelu_tanh")
    assert config.attention_scale is None


def test_gemma3_says_otherwise(tmp_path: Path) -> None:
    config = _open(
        tmp_path,
        "gemma3",
        block_count=4,
        rope__freq_base_swa=20_000.0,
        attention__sliding_window_pattern=[True, False, False, True],
    )
    assert config.windows == (16, 0, 0, 16)
    assert config.local_rope_base == 20_000.0


def test_the_largest_gemma3_scales_attention_by_its_width(tmp_path: Path) -> None:
    config = _open(tmp_path, "gemma3", block_count=62)
    assert config.attention_scale == pytest.approx((64 / 4) ** -0.5)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    assert _open(tmp_path, "gemma3", **fields).rope_scaling == RopeScaling("linear", 8.0)
    assert _open(tmp_path, "llama", rope__scaling__type="none").rope_scaling is None
    with pytest.raises(ModelFileError, match="'yarn' is not supported"):
        _open(tmp_path, "llama", rope__scaling__type="yarn")


def _llama3_divisors(factor: float, original: int = 8192) -> np.ndarray[Any, Any]:
    """By the published rule, one frequency at a time."""
    divisors = []
    for pair in range(synthetic.HEAD // 2):
        wavelength = 2 * math.pi * 50_000.0 ** (2 * pair / synthetic.HEAD)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original / 1:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _with_rope_freqs(tmp_path: Path, divisors: np.ndarray[Any, Any]) -> Any:
    expected = synthetic.parameters("llama")
    tensors = synthetic.gguf_tensors("llama", expected) | {"rope_freqs.weight": divisors}
    model = open_gguf(synthetic.write_gguf(tmp_path / "m.gguf", "llama", tensors), "m")
    dict(model.tensors(synthetic.shapes_of(expected)))  # the extra tensor is no left-over
    return model.config.rope_scaling


def test_llama3_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    scaling = _with_rope_freqs(tmp_path, _llama3_divisors(32.0))
    assert scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert _with_rope_freqs(tmp_path, np.ones(16, np.float32)) is None
    with pytest.raises(ModelFileError, match="rope_freqs"):
        _with_rope_freqs(tmp_path, _llama3_divisors(8.0, original=4096))
    with pytest.raises(ModelFileError, match="rope_freqs"):
        _with_rope_freqs(tmp_path, np.ones(7, np.float32))


def test_an_unknown_architecture_is_named_with_the_known(tmp_path: Path) -> None:
    path = synthetic.write_gguf(tmp_path / "m.gguf", "mamba", {"w": np.ones(32, np.float32)})
    with pytest.raises(ModelFileError, match=r"'mamba' is not known.*gemma3, gpt2, llama, qwen2"):
        open_gguf(path, "m")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": "many"}, "llama.block_count is 'many'"),
        ({"attention__head_count": 0}, "no attention heads"),
        ({"attention__head_count_kv": [2, 1]}, "head_count_kv"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"embedding_length": 32}, r"token_embd.weight has shape \(48, 64\)"),
        ({"rope__dimension_count": 16}, "rope.dimension_count differs"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        _open(tmp_path, "llama", **fields)


def test_counts_written_per_layer_are_one_count_if_alike(tmp_path: Path) -> None:
    assert _open(tmp_path, "llama", attention__head_count_kv=[2, 2]).num_kv_heads == 2


def test_only_tokenizer_metadata_is_handed_on(tmp_path: Path) -> None:
    tensors = synthetic.gguf_tensors("llama", synthetic.parameters("llama"))
    model = open_gguf(synthetic.write_gguf(tmp_path / "m.gguf", "llama", tensors), "m")
    assert model.tokenizer_source == {"tokenizer.ggml.tokens": ["a", "b"]}
    assert model.licence == "mit"
