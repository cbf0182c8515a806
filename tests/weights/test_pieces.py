"""Parts of parameters, read by blocks, are what is cut from the whole; and no more is read."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.decoder import abstract, all_axes, parameters
from fastserve_jax.models.parts import Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.spread import spreading
from fastserve_jax.weights import pieces as module
from fastserve_jax.weights.load import open_folder, open_gguf
from fastserve_jax.weights.pieces import Cut, Parameter, pieces
from tests.weights import synthetic

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe")
DIVIDED = {2: (2, 2), 4: (4, 2)}  # parts, and groups of experts in them


def gguf_model(path, family, arrays, **how):
    stored = synthetic.gguf_tensors(family, arrays)
    return open_gguf(synthetic.write_gguf(path / "model.gguf", family, stored, **how), family)


def folder_model(path, family, arrays):
    config = synthetic.folder_config(family)
    of_family = {"gpt2": synthetic.gpt2_folder_tensors}
    stored = of_family.get(family, lambda arrays: synthetic.folder_tensors(family, arrays))(arrays)
    return open_folder(synthetic.write_folder(path / "model", config, stored, shards=2), family)


def wanted(config, count, dtype=jnp.float32, int8=False):
    """What every part has of each parameter, as the decoder says."""
    parts, groups = DIVIDED[count]
    precision = Precision(dtype, int8)
    parts = Parts(parts, groups if config.num_experts else 1)
    whole = parameters(abstract(config, precision)[1])
    own = abstract(config, precision, parts)[1]
    axes = dict(zip(parameters(own), all_axes(own), strict=True))
    return {
        name: Parameter(
            of.shape,
            of.dtype,
            tuple(
                Cut(tuple(axis and parts.ranges(axis, config, part) for axis in axes[name]))
                for part in range(count if any(axes[name]) else 0)
            ),
        )
        for name, of in whole.items()
    }, parameters(own)


def cut(array, parameter, part):
    """By hand."""
    if not parameter.cuts:
        return array
    for axis, ranges in enumerate(parameter.cuts[part].axes):
        if ranges is not None:
            array = array.take(np.concatenate([np.arange(*run) for run in ranges]), axis)
    return array


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 64 * 7)  # seven rows


@pytest.mark.parametrize("made", [gguf_model, folder_model])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [2, 4])
def test_pieces_are_cut_from_the_whole(tmp_path, made, family, count):
    arrays = synthetic.parameters(family)
    files = made(tmp_path, family, arrays)
    asked, own = wanted(files.config, count)
    found = dict(pieces(files, asked))
    assert found.keys() == asked.keys()
    divided = 0
    for name, got in found.items():
        divided += len(got) == count
        for part, piece in enumerate(got):
            assert piece.shape == own[name].shape, name
            assert np.allclose(piece, cut(arrays[name], asked[name], part), atol=1e-6), name
    assert divided >= 9  # both layers and the embedding


def test_a_kv_head_that_two_parts_share_is_in_both(tmp_path):
    arrays = synthetic.parameters("llama")
    files = folder_model(tmp_path, "llama", arrays)
    asked, _ = wanted(files.config, 4)  # of two KV heads
    got = dict(pieces(files, asked))["layers.0.attn.qkv.weight"]
    keys = [piece[synthetic.HEAD : 2 * synthetic.HEAD] for piece in got]
    assert np.array_equal(keys[0], keys[1])
    assert np.array_equal(keys[2], keys[3])
    assert not np.array_equal(keys[1], keys[2])


def test_quantised_files_are_read_in_place(tmp_path):
    arrays = synthetic.parameters("qwen3")
    kind = gguf.GGMLQuantizationType.Q8_0
    files = gguf_model(tmp_path, "qwen3", arrays, quantised=kind)
    asked, _ = wanted(files.config, 2)
    whole = dict(files.tensors({name: of.shape for name, of in asked.items()}))
    for name, got in pieces(files, asked):
        for part, piece in enumerate(got):
            assert np.array_equal(piece, cut(whole[name], asked[name], part)), name


def test_int8_is_made_of_each_piece_by_itself(tmp_path):
    """Where the input is divided, so are the blocks that it is spread over, and the scales."""
    arrays = synthetic.parameters("llama")
    files = folder_model(tmp_path, "llama", arrays)
    asked, own = wanted(files.config, 2, jnp.bfloat16, int8=True)
    found = dict(pieces(files, asked))
    assert found.keys() == asked.keys()
    for name in ("layers.1.mlp.down.weight", "layers.0.attn.qkv.weight"):
        scales = found[name.replace("weight", "scale")]
        for part, (piece, scale) in enumerate(zip(found[name], scales, strict=True)):
            assert piece.dtype == np.int8
            assert scale.shape == own[name.replace("weight", "scale")].shape
            turn = spreading(piece.shape[1])
            rows = (piece * scale[:, None]).reshape(-1, len(turn)) @ turn
            want = cut(arrays[name], asked[name], part)
            assert np.abs(rows.reshape(want.shape) - want).max() < 0.05 * np.abs(want).max()


def test_only_what_is_wanted_is_read(tmp_path):
    arrays = synthetic.parameters("llama")
    files = folder_model(tmp_path, "llama", arrays)
    read, source = [], files._source
    real = source.read

    def noting(name, rows=None):
        read.append((name, rows))
        return real(name, rows)

    source.read = noting
    asked, _ = wanted(files.config, 4)
    last = {  # the fourth part alone
        name: Parameter(of.shape, of.dtype, of.cuts[3:]) for name, of in asked.items()
    }
    dict(pieces(files, last))
    rows = [run for name, run in read if name == "model.embed_tokens.weight"]
    assert rows == [(35, 42), (42, 48)], "of 48 rows in blocks of seven, those from 36 on"
    assert all(run is not None for name, run in read), "a whole tensor was read"


@pytest.mark.parametrize("made", [gguf_model, folder_model])
def test_what_does_not_fit_is_named(tmp_path, made):
    arrays = synthetic.parameters("llama")
    arrays["layers.1.mlp.down.weight"] = arrays["layers.1.mlp.down.weight"][:-1]
    files = made(tmp_path, "llama", arrays)
    asked, _ = wanted(files.config, 2)
    with pytest.raises(ModelFileError, match=r"makes layers\.1\.mlp\.down\.weight \(63, 96\), exp"):
        dict(pieces(files, asked))


def test_a_missing_tensor_is_named_before_any_is_given(tmp_path):
    arrays = synthetic.parameters("llama")
    files = folder_model(tmp_path, "llama", {**arrays})
    asked, _ = wanted(files.config, 2)
    del files._source.tensors["model.norm.weight"]
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight is missing"):
        next(pieces(files, asked))
