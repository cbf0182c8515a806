"""The converted copy: the same numbers, made once, and never trusted when it is not whole."""

import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastserve_jax.models.decoder import abstract, parameters
from fastserve_jax.models.layers import spread
from fastserve_jax.models.precision import Precision
from fastserve_jax.weights.converted import KEPT, parameters_as
from fastserve_jax.weights.load import open_gguf

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def model(shared):
    files = open_gguf(shared("models/stories260K.gguf"), "stories")
    return files, wanted(files, Precision(BF16))


def wanted(files, precision):
    _, empty = abstract(files.config, precision)
    return parameters(empty)


def read(model, folder, precision=None):
    files, structs = model
    if precision is not None:
        structs = wanted(files, precision)
    return dict(parameters_as(files, structs, folder))


def same(one, other):
    assert one.keys() == other.keys()
    return all(one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one)


def test_the_copy_holds_the_same_numbers(model, tmp_path, monkeypatch):
    first = read(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(type(model[0]), "tensors", lambda *_: pytest.fail("converted again"))
    assert same(first, read(model, tmp_path))


def test_another_dtype_is_another_copy(model, tmp_path):
    read(model, tmp_path)
    assert read(model, tmp_path, Precision(np.float32))["embed.weight"].dtype == np.float32
    assert len(list(tmp_path.iterdir())) == 2


def test_the_newest_copies_of_a_model_stay_and_other_models_are_left_alone(model, tmp_path):
    other = tmp_path / f"stories-x-{'0' * 24}.safetensors"
    other.touch()
    for kept in ("layers.*.mlp.down", "layers.*.mlp.gate_up", "embed", "layers.0.*"):
        before = set(tmp_path.iterdir())
        read(model, tmp_path, Precision(BF16, int8=True, kept=(kept,)))
        (newest,) = set(tmp_path.iterdir()) - before
        os.utime(newest, ns=(0, len(before)))  # in order, however fast this goes
    assert newest.exists()
    assert other.exists()
    assert len(list(tmp_path.iterdir())) == KEPT + 1


def test_int8_with_a_scale_per_output(model, tmp_path):
    whole = read(model, tmp_path, Precision(np.float32))
    made = read(model, tmp_path, Precision(BF16, int8=True, kept=("layers.*.mlp.down",)))
    assert same(
        made, read(model, tmp_path, Precision(BF16, int8=True, kept=("layers.*.mlp.down",)))
    )
    assert len(list(tmp_path.iterdir())) == 2
    assert made["layers.0.mlp.down.weight"].dtype == BF16
    for name in ("embed", "layers.0.attn.qkv", "layers.4.mlp.gate_up"):
        matrix, scale = made[f"{name}.weight"], made[f"{name}.scale"]
        assert matrix.dtype == np.int8
        assert np.abs(matrix).max(axis=1).tolist() == [127] * len(matrix)
        exact = np.asarray(spread(jnp.asarray(whole[f"{name}.weight"])))
        assert np.abs(matrix * scale[:, None] - exact).max(axis=1).max() <= 0.51 * scale.max()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_a_damaged_copy_is_made_again(model, tmp_path, damage):
    first = read(model, tmp_path)
    (copy,) = tmp_path.iterdir()
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(first, read(model, tmp_path))
    assert copy.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_else(model, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert len(read(model, blocked / "converted")) == len(model[1])


def test_a_reader_that_stops_leaves_nothing(model, tmp_path):
    next(parameters_as(*model, tmp_path))
    assert not list(tmp_path.iterdir())
