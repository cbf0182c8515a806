"""PEFT's folders: what they mean, and that nothing else is taken for them."""

import json
from contextlib import nullcontext
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.models.adapters import matrices
from fastserve_jax.weights.adapter import find_adapter, write_adapter
from fastserve_jax.weights.adapter_arrays import merged, read_adapter
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.registry import Registry
from tests.models.families import FAMILIES
from tests.weights import peft

CONFIG = FAMILIES["llama"]
BEGIN = "base_model.model.model.layers.1."


def changes(layers):
    """What each of the decoder's matrices is changed by, from what was read."""
    return {
        f"layers.{i}.{name}.weight": np.concatenate(
            [b.astype(np.float64) @ a for a, b in zip(pair.a, pair.b, strict=True)]
        )
        for i, layer in enumerate(layers)
        for name, pair in layer.items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("facts", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_reading(tmp_path, family, facts):
    config = FAMILIES[family]
    tensors, added = peft.draw(config, 4, 1)
    folder = peft.write(tmp_path / "a", tensors, 4, **facts)
    scale = 3 / 4 if "lora_alpha" in facts else 8 / 2 if facts else 2
    found = changes(read_adapter(folder, config, 6, np.float32))
    assert found.keys() == added.keys()
    for name, change in found.items():
        np.testing.assert_allclose(change, scale * added[name], atol=1e-5)


def test_merging_takes_ranks_above_r(tmp_path):
    """As PEFT's rank_pattern makes them; r is that of the others."""
    tensors, added = peft.draw(CONFIG, 2, 1)
    more, higher = peft.draw(CONFIG, 5, 2, targets=("o_proj",))
    folder = peft.write(tmp_path / "a", tensors | more, 2, rank_pattern={"o_proj": 5})
    arrays = {name: np.zeros(change.shape, np.float32) for name, change in added.items()}
    found = merged(folder, CONFIG, arrays)
    for name, change in added.items():
        want = 4 / 5 * higher[name] if name.endswith("attn.out.weight") else 2 * change
        np.testing.assert_allclose(found[name], want, atol=1e-5)


def test_some_matrices_of_some_layers_and_another_float_type(tmp_path):
    tensors, added = peft.draw(CONFIG, 2, 1, targets=("q_proj", "v_proj", "up_proj"))
    kept = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors.items() if ".layers.1." in n}
    folder = peft.write(tmp_path / "a", kept, 2, layers_to_transform=[1])
    layers = read_adapter(folder, CONFIG, 2, ml_dtypes.bfloat16)
    assert {array.dtype for pair in layers[1].values() for array in (pair.a, *pair.b)} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    found = changes(layers)
    for name, change in added.items():
        want = 2 * change if name.startswith("layers.1") else 0 * change
        np.testing.assert_allclose(found[name], want, atol=0.05)


@pytest.mark.parametrize(
    ("facts", "is_told"),
    [
        ({"layers_to_transform": [0, 1]}, True),
        ({"layers_to_transform": [0]}, False),
        ({"layers_to_transform": 0}, False),
        ({"exclude_modules": ["model.layers.1.mlp.down_proj"]}, False),
        ({"exclude_modules": ["layers.0.mlp.down_proj"]}, True),
        ({"exclude_modules": r".*\.1\.mlp\.down_proj"}, False),
    ],
)
def test_what_is_not_there_may_not_be_meant_to_be(tmp_path, facts, is_told):
    tensors, _ = peft.draw(CONFIG, 3, 1)
    folder = peft.write(tmp_path / "a", without(".1.mlp.down_proj")(tensors), 3, **facts)
    with pytest.raises(ModelFileError, match="is missing") if is_told else nullcontext():
        read_adapter(folder, CONFIG, 3, np.float32)


def without(name):
    return lambda tensors: {n: a for n, a in tensors.items() if name not in n}


def changed(name, change):
    return lambda tensors: tensors | {BEGIN + name: change(tensors[BEGIN + name])}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without("1.self_attn.q_proj.lora_B"),
            "layers.1.self_attn.q_proj.lora_B.weight is missing",
        ),
        (without("1.mlp.down_proj"), r"down_proj.lora_A.*down_proj.lora_B.* is missing"),
        (
            changed("mlp.up_proj.lora_B.weight", lambda b: b[:-1]),
            r"up_proj has \(3, 48\) and \(79, 3\), expected \(3, 48\) and \(80, 3\)",
        ),
        (changed("mlp.up_proj.lora_A.weight", lambda a: a[:0]), r"has \(0, 48\)"),
        (changed("self_attn.v_proj.lora_A.weight", lambda a: a * np.nan), "not finite"),
        (changed("self_attn.v_proj.lora_B.weight", lambda b: b.astype(np.int8)), "not a float"),
        (
            lambda tensors: tensors | {"base_model.model.lm_head.lora_A.weight": np.ones((3, 48))},
            "lm_head.lora_A.weight is beside no matrix .*: q_proj, k_proj, v_proj, o_proj",
        ),
        (
            lambda tensors: {n.replace("layers.1.", "layers.2."): a for n, a in tensors.items()},
            "layers.1.self_attn.q_proj.lora_A.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, edit, message):
    tensors = edit(peft.draw(CONFIG, 3, 1)[0])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folder = peft.write(tmp_path / "a", tensors, 3, target_modules=targets)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(folder, CONFIG, 4, np.float32)


def test_too_large_for_the_dtype_or_the_room(tmp_path):
    folder = peft.write(tmp_path / "a", peft.draw(CONFIG, 3, 1)[0], 3, lora_alpha=1e6)
    with pytest.raises(ModelFileError, match="not finite"):
        read_adapter(folder, CONFIG, 4, np.float16)
    with pytest.raises(ConfigError, match=r"rank 3, .* for 2: .*lora\.max_rank=3"):
        read_adapter(folder, CONFIG, 2, np.float32)
    with pytest.raises(ModelFileError, match="expected"):
        read_adapter(folder, replace(CONFIG, hidden_size=64), 4, np.float32)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is not supported"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"r": 0}, "r 0"),
        ({"r": "four"}, "cannot read: .*r`"),
    ],
)
def test_settings_that_mean_something_else(tmp_path, facts, message):
    folder = peft.write(tmp_path / "a", peft.draw(CONFIG, 3, 1)[0], 3, **facts)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(folder, CONFIG, 4, np.float32)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelFileError, match="no adapter 'nothing'"):
        find_adapter("nothing", tmp_path)
    folder = peft.write(tmp_path / "a", peft.draw(CONFIG, 3, 1)[0], 3)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelFileError, match=r"adapter_model\.safetensors: cannot read"):
        read_adapter(folder, CONFIG, 4, np.float32)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="cannot read"):
        read_adapter(folder, CONFIG, 4, np.float32)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelFileError, match=r"adapter_config\.json: cannot read"):
        read_adapter(folder, CONFIG, 4, np.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_what_is_written_is_read_as_it_was(tmp_path, family, layers):
    config, rng, trained = FAMILIES[family], np.random.default_rng(4), {}
    for name, (size, outs) in matrices(config).items():
        if name == "mlp.down":
            continue
        for layer in layers:
            a, b = rng.standard_normal((3, size)), rng.standard_normal((sum(outs), 3))
            trained[f"layers.{layer}.{name}.weight"] = a.astype(np.float32), b.astype(np.float32)
    write_adapter(tmp_path / "a", config, trained, 6.0, "some/base")
    read = read_adapter(tmp_path / "a", config, 4, np.float32)
    for name, change in changes(read).items():
        a, b = trained.get(name, (np.zeros((3, 1)), np.zeros((1, 3))))
        np.testing.assert_allclose(change, 2 * b @ a + 0 * change, atol=1e-5)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    facts = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (3, 6.0)
    names = peft.draw(config, 3, 0)[0]  # all that there could be
    of_peft = {n for n in names if n.split(".lora_")[0].endswith((*facts["target_modules"],))}
    assert {*stored} == of_peft
    with pytest.raises(ConfigError, match=r"embed.weight cannot have an adapter"):
        write_adapter(tmp_path / "b", config, {"embed.weight": (a, b)}, 6.0, "some/base")
    assert not (tmp_path / "b").exists()


def test_an_adapter_is_registered_and_is_no_model_by_itself(tmp_path):
    folder = peft.write(tmp_path / "made", peft.draw(CONFIG, 3, 1)[0], 3)
    registry = Registry(tmp_path / "registry")
    version = registry.add("polite", folder, "train", parent="stories@2")
    assert registry.is_adapter(version)
    assert find_adapter("polite", tmp_path) == registry.path(version)
    command = "fastserve serve some/base --adapter polite=polite@1"
    with pytest.raises(ModelFileError, match=f"polite@1 is an adapter of some/base: {command}"):
        open_model("polite", tmp_path)
    peft.write(tmp_path / "bare", {}, 3, base_model_name_or_path=None)
    with pytest.raises(ModelFileError, match="is an adapter: fastserve serve MODEL --adapter"):
        open_model(str(tmp_path / "bare"), tmp_path)
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="no adapter"):
        find_adapter(str(tmp_path), tmp_path)
