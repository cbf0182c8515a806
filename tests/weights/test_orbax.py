"""Models of our own: written and read back, whole and in pieces, and refused where damaged."""

import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fastserve_jax.errors import ModelFileError
from fastserve_jax.weights import orbax
from fastserve_jax.weights.load import open_config, open_folder
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.pieces import pieces
from tests.weights import synthetic
from tests.weights.test_pieces import FAMILIES, cut, gguf_model, wanted


def written(folder, family, dtype=np.float32):
    arrays = synthetic.parameters(family)
    (folder / "gguf").mkdir()
    config = gguf_model(folder / "gguf", family, arrays).config
    path = folder / "model"
    write_model(path, config, {name: array.astype(dtype) for name, array in arrays.items()})
    return path, config, arrays


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_read(tmp_path, family):
    path, config, arrays = written(tmp_path, family)
    files = open_folder(path, family)
    assert files.config == config
    shutil.copytree(path, bare := tmp_path / "bare", ignore=lambda *_: ["params"])
    assert open_config(str(bare), tmp_path) == ("bare", config), "weights are not needed"
    found = dict(files.tensors(synthetic.shapes_of(arrays)))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_in_pieces(tmp_path, family, monkeypatch):
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 4096)
    path, config, arrays = written(tmp_path, family, ml_dtypes.bfloat16)
    asked, _ = wanted(config, 2, jnp.bfloat16)
    files = open_folder(path, family)
    read, real = [], files._source.read
    object.__setattr__(files, "_source", Noting(files._source, read, real))
    for name, got in pieces(files, asked):
        for part, piece in enumerate(got):
            assert piece.dtype == ml_dtypes.bfloat16
            whole = arrays[name].astype(ml_dtypes.bfloat16)
            assert np.array_equal(piece, cut(whole, asked[name], part)), name
    assert all(rows is not None for rows in read), "a whole tensor was read"


class Noting:
    def __init__(self, source, read, real):
        self._source, self._read, self._real = source, read, real

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, name, rows=None):
        self._read.append(rows)
        return self._real(name, rows)


def test_a_folder_is_written_once_and_whole(tmp_path):
    path, config, arrays = written(tmp_path, "llama")
    with pytest.raises(FileExistsError):
        write_model(path, config, arrays)
    with pytest.raises(ValueError, match="TypeHandler lookup failed"):
        write_model(tmp_path / "other", config, {"embed.weight": object()})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["gguf", "model"]


def test_damage_is_named(tmp_path):
    path, _, _ = written(tmp_path, "llama")
    (path / "model.json").write_text('{"family": "llama"}')
    with pytest.raises(ModelFileError, match=r"model\.json: cannot read: .*vocab_size"):
        open_folder(path, "m")
    (path / "model.json").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"model\.json: cannot read"):
        open_folder(path, "m")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_checkpoint_with_a_file_missing_is_named(tmp_path, name):
    path, _, arrays = written(tmp_path, "llama")
    (path / "params" / name).unlink()
    with pytest.raises(ModelFileError):
        dict(open_folder(path, "m").tensors(synthetic.shapes_of(arrays)))


def test_a_missing_parameter_is_named(tmp_path):
    arrays = synthetic.parameters("llama")
    config = gguf_model(tmp_path, "llama", arrays).config
    del arrays["layers.1.mlp.down.weight"]
    write_model(tmp_path / "own", config, arrays)
    files = open_folder(tmp_path / "own", "m")
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.down\.weight is missing"):
        dict(files.tensors(synthetic.shapes_of(synthetic.parameters("llama"))))


def test_integers_are_named(tmp_path):
    path = tmp_path / "own"
    arrays = synthetic.parameters("llama")
    config = gguf_model(tmp_path, "llama", arrays).config
    write_model(path, config, arrays | {"embed.weight": np.zeros((48, 64), np.int32)})
    with pytest.raises(ModelFileError, match=r"embed\.weight is int32, not a float type"):
        dict(open_folder(path, "m").tensors(synthetic.shapes_of(arrays)))
