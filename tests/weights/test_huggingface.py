"""Hugging Face folders of every family: configuration, parameters, shards, damage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig, RopeScaling
from fastserve_jax.weights.huggingface_config import read_config_file, read_sampling
from fastserve_jax.weights.load import open_config, open_folder
from tests.models import t5
from tests.weights import synthetic
from tests.weights.synthetic import Arrays, folder_config, write_folder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", *synthetic.WITH_EXPERTS)


def _stored(family: str, arrays: Arrays) -> Arrays:
    if family == "gpt2":
        return synthetic.gpt2_folder_tensors(arrays)
    return synthetic.folder_tensors(family, arrays)


def _check(folder: Path, expected: Arrays, tolerance: float = 0.0) -> None:
    loaded = dict(open_folder(folder, "m").tensors(synthetic.shapes_of(expected)))
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(loaded[name], array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_come_back_as_they_were(tmp_path: Path, family: str, shards: int) -> None:
    expected = synthetic.parameters(family)
    folder = write_folder(
        tmp_path / "m", folder_config(family), _stored(family, expected), shards=shards
    )
    _check(folder, expected, tolerance=1e-6 if family == "gemma3" else 0.0)


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    expected = synthetic.parameters("qwen2", tied=False)
    config = folder_config("qwen2", tie_word_embeddings=False)
    _check(write_folder(tmp_path / "m", config, _stored("qwen2", expected)), expected)


def test_a_copy_of_the_embedding_as_head_is_no_left_over(tmp_path: Path) -> None:
    expected = synthetic.parameters("llama")
    stored = _stored("llama", expected) | {"lm_head.weight": expected["embed.weight"]}
    _check(write_folder(tmp_path / "m", folder_config("llama"), stored), expected)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_names_without_the_model_prefix(tmp_path: Path, family: str, prefix: str) -> None:
    expected = synthetic.parameters(family)
    stored = {name.removeprefix(prefix): a for name, a in _stored(family, expected).items()}
    _check(write_folder(tmp_path / "m", folder_config(family), stored), expected)


def test_buffers_that_are_no_parameters_are_passed_over(tmp_path: Path) -> None:
    expected = synthetic.parameters("gpt2")
    mask = np.ones((1, 1, 8, 8), np.float32)
    buffers = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask[0]}
    stored = _stored("gpt2", expected) | buffers
    _check(write_folder(tmp_path / "m", folder_config("gpt2"), stored), expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_types_stay_as_they_are_stored(tmp_path: Path, dtype: Any) -> None:
    expected = {n: a.astype(dtype) for n, a in synthetic.parameters("llama").items()}
    folder = write_folder(tmp_path / "m", folder_config("llama"), _stored("llama", expected))
    for name, array in open_folder(folder, "m").tensors(synthetic.shapes_of(expected)):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_gemma_norms_are_one_more_than_stored_in_any_type(tmp_path: Path) -> None:
    expected = synthetic.parameters("gemma3")
    stored = {n: a.astype(ml_dtypes.bfloat16) for n, a in _stored("gemma3", expected).items()}
    folder = write_folder(tmp_path / "m", folder_config("gemma3"), stored)
    loaded = dict(open_folder(folder, "m").tensors(synthetic.shapes_of(expected)))
    norm = stored["model.norm.weight"].astype(np.float32) + 1  # in float32, not rounded again
    np.testing.assert_array_equal(loaded["final_norm.weight"], norm)


def _config(tmp_path: Path, family: str, **changes: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(folder_config(family, **changes)))
    return read_config_file(tmp_path / "config.json")[0]


def test_llama_config(tmp_path: Path) -> None:
    assert _config(tmp_path, "llama", tie_word_embeddings=None) == ModelConfig(
        family="llama",
        vocab_size=synthetic.VOCAB,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        max_context=128,
        norm_eps=1e-5,
        rope_base=50_000.0,
        tied_head=False,
    )


def test_configs_with_experts(tmp_path: Path) -> None:
    mixtral = _config(tmp_path, "mixtral", sliding_window=None)
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.norm_topk) == (4, 2, True)
    assert (mixtral.intermediate_size, mixtral.windows) == (96, ())
    qwen = _config(tmp_path, "qwen3_moe", norm_topk_prob=False)
    assert (qwen.num_experts, qwen.experts_per_token, qwen.norm_topk) == (4, 2, False)
    assert (qwen.intermediate_size, qwen.qk_norm) == (96, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"num_experts": None}, "num_experts is missing"),
    ],
)
def test_experts_that_cannot_be_are_refused(tmp_path: Path, changes: Any, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(folder_config("qwen3_moe", **changes)))
    with pytest.raises(ModelFileError, match=reason):
        open_config(str(path), tmp_path)


def test_gpt2_config(tmp_path: Path) -> None:
    config = _config(tmp_path, "gpt2", n_inner=None)
    assert (config.intermediate_size, config.head_dim) == (256, 16)
    assert (config.norm_eps, config.tied_head) == (1e-5, True)
    assert config.linear_bias
    assert not config.gated_mlp


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        ({}, 50_000.0, None),
        ({"rope_theta": None}, 10_000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 5e4, RopeScaling("linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
            5e4,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
            7e4,
            None,
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e4, **_LLAMA3}},
            7e4,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope_in_old_and_new_keys(
    tmp_path: Path, changes: dict[str, Any], base: float, scaling: RopeScaling | None
) -> None:
    config = _config(tmp_path, "llama", **changes)
    assert (config.rope_base, config.rope_scaling) == (base, scaling)


def test_windows_by_family(tmp_path: Path) -> None:
    assert _config(tmp_path, "mistral").windows == ()
    assert _config(tmp_path, "mistral", sliding_window=9).windows == (9, 9)
    assert _config(tmp_path, "qwen2", sliding_window=9).windows == ()
    qwen = {"sliding_window": 9, "use_sliding_window": True, "num_hidden_layers": 3}
    assert _config(tmp_path, "qwen2", max_window_layers=1, **qwen).windows == (0, 9, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert _config(tmp_path, "qwen3", layer_types=types, **qwen).windows == (9, 0, 0)


def test_gemma3_in_old_and_new_keys(tmp_path: Path) -> None:
    old = _config(
        tmp_path,
        "gemma3",
        num_hidden_layers=6,
        sliding_window_pattern=3,
        rope_theta=1e6,
        rope_local_base_freq=12_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = _config(
        tmp_path,
        "gemma3",
        num_hidden_layers=6,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        rope_theta=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 12_000.0},
        },
    )
    assert old == new
    assert new.windows == (16, 16, 0, 16, 16, 0)
    assert (new.rope_base, new.local_rope_base) == (1e6, 12_000.0)
    assert new.rope_scaling == RopeScaling("linear", 8.0)
    assert new.embedding_scale == math.sqrt(64)


def test_gemma3_attention_scale(tmp_path: Path) -> None:
    assert _config(tmp_path, "gemma3").attention_scale is None
    config = _config(tmp_path, "gemma3", query_pre_attn_scalar=168)
    assert config.attention_scale == pytest.approx(168**-0.5)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"architectures": ["MambaForCausalLM"]}, r"'MambaForCausalLM'.*GPT2LMHeadModel"),
        ("llama", {"architectures": None}, "architecture None"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("llama", {"num_attention_heads": -1}, "num_attention_heads is -1"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is None"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mistral", {"sliding_window": 9, "layer_types": ["full_attention"]}, "layer_types"),
        ("gpt2", {"n_head": 5}, "5 heads do not divide"),
    ],
)
def test_settings_that_cannot_be_served(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelFileError, match=reason):
        _config(tmp_path, family, **changes)


def _refusal(tmp_path: Path) -> str:
    with pytest.raises(ModelFileError) as refused:
        open_folder(tmp_path, "m")
    return str(refused.value)


def test_the_exact_gelu_is_not_taken_for_the_other(tmp_path: Path) -> None:
    for kind, is_known in (("gated-gelu", True), ("gelu_new", True), ("gelu", False)):
        settings = t5.config_of("flan-t5") | {"feed_forward_proj": kind}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if is_known:
            assert open_config(str(tmp_path), tmp_path)[1].activation == "gelu_tanh"
        else:
            with pytest.raises(ModelFileError, match="feed_forward_proj"):
                open_config(str(tmp_path), tmp_path)


def test_damaged_folders(tmp_path: Path) -> None:
    assert "config.json: cannot read" in _refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: cannot read" in _refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in _refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(folder_config("llama")))
    assert "neither model.safetensors nor" in _refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{")
    assert "model.safetensors: cannot read" in _refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    assert "outside the folder" in _refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model-2.safetensors"}}))
    assert "model-2.safetensors: cannot read" in _refusal(tmp_path)


def test_integer_weights_are_named(tmp_path: Path) -> None:
    expected = synthetic.parameters("llama")
    stored = _stored("llama", expected)
    folder = write_folder(tmp_path / "m", folder_config("llama"), stored)
    stored["model.norm.weight"] = np.ones(64, np.int8)
    save_file({n: np.ascontiguousarray(a) for n, a in stored.items()}, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight is I8"):
        dict(open_folder(folder, "m").tensors(synthetic.shapes_of(expected)))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, None),
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"temperature": None, "top_k": 0}, {}),
    ],
)
def test_sampling_that_the_makers_advise(tmp_path: Path, written: dict, read: dict | None) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert read_sampling(tmp_path) == (written if read is None else read)


def test_bad_advice_is_named(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"top_p": "high"}')
    with pytest.raises(ModelFileError, match="top_p"):
        read_sampling(tmp_path)
