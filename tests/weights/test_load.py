"""What a person may call a model, and parameters that do not add up."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve_jax.errors import ModelFileError, PullFailed
from fastserve_jax.weights import load
from fastserve_jax.weights.load import ModelFiles, open_gguf, open_model
from tests.weights import synthetic
from tests.weights.synthetic import Arrays


def _model(tmp_path: Path, tensors: Arrays) -> ModelFiles:
    return open_gguf(synthetic.write_gguf(tmp_path / "m.gguf", "llama", tensors), "m")


@pytest.fixture
def expected() -> Arrays:
    return synthetic.parameters("llama")


def test_missing_tensors_are_named_before_any_is_given(tmp_path: Path, expected: Arrays) -> None:
    tensors = synthetic.gguf_tensors("llama", expected)
    del tensors["blk.1.attn_k.weight"], tensors["output_norm.weight"]
    given = _model(tmp_path, tensors).tensors(synthetic.shapes_of(expected))
    with pytest.raises(
        ModelFileError, match=r"tensors blk\.1\.attn_k\.weight, output_norm\.weight are missing"
    ):
        next(given)


def test_many_missing_tensors_are_counted(tmp_path: Path, expected: Arrays) -> None:
    tensors = synthetic.gguf_tensors("llama", expected)
    model = _model(tmp_path, {"token_embd.weight": tensors["token_embd.weight"]})
    with pytest.raises(ModelFileError, match="and 15 more are missing"):
        dict(model.tensors(synthetic.shapes_of(expected)))


def test_tensors_left_over_are_named(tmp_path: Path, expected: Arrays) -> None:
    tensors = synthetic.gguf_tensors("llama", expected)
    tensors["blk.0.ffn_gate_inp.weight"] = np.ones((4, 64), np.float32)
    model = _model(tmp_path, tensors)
    with pytest.raises(ModelFileError, match=r"ffn_gate_inp\.weight is unknown to llama"):
        dict(model.tensors(synthetic.shapes_of(expected)))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("blk.1.ffn_down.weight", (64, 32), r"makes layers\.1\.mlp\.down\.weight \(64, 32\)"),
        ("blk.0.attn_v.weight", (32, 64), r"attn_q\.weight \+ blk\.0\.attn_k.* makes layers\.0"),
        ("blk.0.attn_v.weight", (64, 32), r"blk\.0\.attn_v\.weight do not fit"),
        ("blk.0.attn_q.weight", (30, 64), r"blk\.0\.attn_q\.weight.* do not fit"),
        ("output_norm.weight", (32,), r"final_norm\.weight \(32,\), expected \(64,\)"),
    ],
)
def test_mis_shaped_tensors_are_named(
    tmp_path: Path, expected: Arrays, name: str, shape: tuple[int, ...], reason: str
) -> None:
    tensors = synthetic.gguf_tensors("llama", expected)
    tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(ModelFileError, match=reason):
        dict(_model(tmp_path, tensors).tensors(synthetic.shapes_of(expected)))


def test_few_parameters_are_in_memory_at_a_time(
    tmp_path: Path, expected: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path, synthetic.gguf_tensors("llama", expected))
    begun = []
    lock = threading.Lock()
    assemble = ModelFiles._assemble

    def counting(self: ModelFiles, stored: Any) -> Any:
        with lock:
            begun.append(stored)
        return assemble(self, stored)

    monkeypatch.setattr(ModelFiles, "_assemble", counting)
    for given, _ in enumerate(model.tensors(synthetic.shapes_of(expected)), 1):
        assert len(begun) <= given + 1


def test_leaving_early_ends_the_threads(tmp_path: Path, expected: Arrays) -> None:
    model = _model(tmp_path, synthetic.gguf_tensors("llama", expected))
    given = model.tensors(synthetic.shapes_of(expected))
    next(given)
    given.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


def test_a_file_a_folder_and_a_name(tmp_path: Path, expected: Arrays) -> None:
    synthetic.write_gguf(tmp_path / "m.gguf", "llama", synthetic.gguf_tensors("llama", expected))
    model = open_model(str(tmp_path / "m.gguf"), tmp_path)
    assert (model.name, model.config.family) == ("m", "llama")
    folder = synthetic.write_folder(
        tmp_path / "f",
        synthetic.folder_config("llama"),
        synthetic.folder_tensors("llama", expected),
    )
    model = open_model(str(folder), tmp_path)
    assert (model.name, model.tokenizer_source) == ("f", folder)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("smollm2-135m", "no model 'smollm2-135m'.*the catalogue has smollm2-135m-instruct$"),
        ("Gemma3-270M", "the catalogue has gemma3-270m$"),
        ("/no/such/file.gguf", "no model '/no/such/file.gguf': not a file, a folder or hf:"),
        ("zzz", "gemma3-270m, qwen2.5-coder-0.5b-instruct, smollm2-135m-instruct"),
    ],
)
def test_unknown_names_get_the_nearest(tmp_path: Path, reference: str, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        open_model(reference, tmp_path)


def test_a_catalogue_name_brings_its_terms(
    tmp_path: Path, expected: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = synthetic.write_gguf(
        tmp_path / "m.gguf", "llama", synthetic.gguf_tensors("llama", expected)
    )
    asked = []

    def fetch(model: Any, cache_dir: Path, progress: Any) -> Path:
        asked.append((model.name, cache_dir))
        return path

    monkeypatch.setattr(load, "fetch", fetch)
    model = open_model("gemma3-270m", tmp_path)
    assert asked == [("gemma3-270m", tmp_path)]
    assert model.name == "gemma3-270m"
    assert model.licence == "Gemma Terms of Use"
    assert "found at ai.google.dev/gemma/terms" in model.notice


def test_the_hub_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_hub(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(ModelFileError, match=r"pip install 'fastserve-jax\[hub\]'"):
        open_model("hf:org/name", tmp_path)


def test_the_hub_gives_only_weights_and_vocabulary(
    tmp_path: Path, expected: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    folder = synthetic.write_folder(
        tmp_path / "f",
        synthetic.folder_config("llama"),
        synthetic.folder_tensors("llama", expected),
    )

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "org/name"
        assert not any(
            pattern.endswith((".py", ".bin", ".pt", "*"))
            for pattern in allow_patterns
            if not pattern.startswith(("LICENSE", "NOTICE"))
        )
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_model("hf:org/name", tmp_path).name == "org/name"

    def offline(name: str, **kwargs: Any) -> str:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(PullFailed, match=r"^hf:org/name: cannot download: no route$"):
        open_model("hf:org/name", tmp_path)
    with pytest.raises(ModelFileError, match="expected hf:org/name"):
        open_model("hf:name", tmp_path)


@pytest.mark.model
def test_the_default_model_is_what_it_says(model_path: Any) -> None:
    config = open_gguf(model_path("smollm2-135m-instruct"), "m").config
    assert (config.num_layers, config.hidden_size, config.num_heads) == (30, 576, 9)
    assert (config.num_kv_heads, config.head_dim, config.max_context) == (3, 64, 8192)
    assert (config.rope_base, config.vocab_size, config.tied_head) == (100_000.0, 49152, True)
