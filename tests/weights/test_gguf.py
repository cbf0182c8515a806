"""The GGUF reader against the `gguf` package's own writer and reader, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_jax.errors import ModelFileError
from fastserve_jax.weights.gguf import GgufFile
from tests.weights import synthetic

_Q = gguf.GGMLQuantizationType
_WRITABLE = (_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0, _Q.TQ1_0, _Q.TQ2_0, _Q.MXFP4)


def _write(path: Path, tensors: dict[str, np.ndarray], **fields: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", _WRITABLE, ids=lambda kind: kind.name)
def test_every_block_type_gives_what_the_package_dequantises(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    values = np.random.default_rng(1).standard_normal((6, 512), np.float32)
    raw = quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufFile(tmp_path / "m.gguf").read("w")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, dequantize(raw, kind))
    assert np.abs(read - values).max() < 3  # the same values, in the same places


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits), ids=lambda kind: kind.name)
def test_every_type_that_the_package_knows_is_read(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(2).integers(0, 60, (3, 2 * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        read = GgufFile(tmp_path / "m.gguf").read("w")
        assert read.shape == (3, 2 * block)
        np.testing.assert_array_equal(read.astype(np.float32), dequantize(raw, kind))


def test_half_types_stay_as_they_are_stored(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("half", values.astype(np.float16))
    writer.add_tensor("brain", quantize(values, _Q.BF16), raw_dtype=_Q.BF16)
    writer.add_tensor("double", values.astype(np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert file.read("half").dtype == np.float16
    assert file.read("brain").dtype == ml_dtypes.bfloat16
    assert file.read("double").dtype == np.float32
    for name in ("half", "brain", "double"):
        np.testing.assert_array_equal(file.read(name).astype(np.float32), values)


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = GgufFile(_write(tmp_path / "m.gguf", {"counts": np.ones(4, np.int32)}))
    with pytest.raises(ModelFileError, match="counts is stored as I32"):
        file.read("counts")


def test_metadata_of_every_type(tmp_path: Path) -> None:
    fields = {
        "a.text": "grüße",
        "a.flag": True,
        "a.count": 7,
        "a.ratio": 0.5,
        "a.words": ["x", "", "▁y"],
        "a.numbers": [1, -2, 3],
        "a.floats": [0.25, -1.5],
    }
    file = GgufFile(_write(tmp_path / "m.gguf", {"w": np.ones((2, 3), np.float32)}, **fields))
    assert fields.items() <= file.metadata.items()
    assert file.shape("w") == (2, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tensors = synthetic.gguf_tensors("llama", synthetic.parameters("llama"))
    return synthetic.write_gguf(path, "llama", tensors).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_truncation_is_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(whole) - 33))  # the last tensor may end in padding
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole[:length])
    with pytest.raises(ModelFileError, match=r"m\.gguf"):
        GgufFile(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = 2600
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\xff" * 8, b"\0" * 8]))
        damaged[at : at + len(value)] = value
    path = tmp_path_factory.mktemp("bad") / "m.gguf"
    path.write_bytes(damaged)
    try:
        file = GgufFile(path)
        for name in file.tensors:
            with np.errstate(all="ignore"):
                assert file.read(name).shape == file.shape(name)
    except ModelFileError:
        pass


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "cannot read"),
        (b"GGML" + bytes(40), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "fields"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, contents: bytes, reason: str) -> None:
    (tmp_path / "m.gguf").write_bytes(contents)
    with pytest.raises(ModelFileError, match=reason):
        GgufFile(tmp_path / "m.gguf")


def test_absurd_array_counts_cost_nothing(tmp_path: Path) -> None:
    for element_type in (0, 4, 8, 9):
        array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, element_type, 1 << 50)
        path = tmp_path / f"{element_type}.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array + bytes(64))
        with pytest.raises(ModelFileError, match="damaged"):
            GgufFile(path)


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", {"w": np.ones(32, np.float32)}, **{"split.count": 3})
    with pytest.raises(ModelFileError, match="merge"):
        GgufFile(path)
