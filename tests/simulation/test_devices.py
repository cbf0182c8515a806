"""Devices: the arithmetic of ours, and files that are read back as they were written."""

import json

import pytest

from fastserve_jax.core.cost import CostModel, StepLoad
from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.devices import DEVICES, read_device, write_device

GOOD = {"base_s": [0.01], "buckets": [1], "prefill_token_s": 1e-4, "decode_row_s": 1e-5}


def test_the_default_is_the_notes_cost_model():
    device = read_device("a100-opt13b")
    load = StepLoad(prefill_tokens=100, decode_rows=16, kv_tokens=4000)
    wanted_s = 0.018 + 100 * 0.17e-3 + 16 * 0.05e-3 + 4000 * 0.82e6 / 1.6e12
    assert device.step_s(load) == pytest.approx(wanted_s)
    # 16 tokens of 0.82 MB at 20 GB/s, beside the compute until they outlast it.
    assert device.move_s(1, 0) == pytest.approx(16 * 0.82e6 / 20e9)
    assert device.stall_s(load._replace(pages_out=10)) == 0
    assert device.stall_s(load._replace(pages_in=100)) == pytest.approx(0.0656 - wanted_s)


@pytest.mark.parametrize("name", DEVICES)
def test_copies_take_as_long_as_their_bytes(name):
    small, large = read_device(name, 16), read_device(name, 64)
    assert large.page_bytes == 4 * small.page_bytes
    assert large.page_in_s == pytest.approx(4 * small.page_in_s)
    assert large.compute_s(StepLoad(decode_rows=1)) == small.compute_s(StepLoad(decode_rows=1))


def test_presets_are_not_shared():
    read_device("a100-opt13b").base_s[0] = 99.0
    assert read_device("a100-opt13b").base_s[0] < 1


def test_a_file_is_read_as_it_was_written(tmp_path):
    model = CostModel([0.01, 0.02], (16, 64), 1e-4, 2e-5, 3e-8, 4e-4, 5e-4, True, 6000, 0.02, 3)
    path = tmp_path / "device.json"
    write_device(path, model, page_size=16, about="measured on a laptop")
    assert read_device(str(path), 16) == model
    assert read_device(str(path), 32).page_out_s == pytest.approx(8e-4)
    assert json.loads(path.read_text())["about"] == "measured on a laptop"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_s": None}, "base_s"),
        ({"base_s": [0.0]}, "every step takes time"),
        ({"base_s": [0.1, 0.2]}, "buckets must ascend"),
        ({"base_s": [0.1, 0.2], "buckets": [4, 4]}, "buckets must ascend"),
        ({"prefill_token_s": -1e-4}, "prefill_token_s is -0.0001"),
        ({"decode_row_s": "fast"}, "decode_row_s"),
        ({"overlaps": 1}, "overlaps"),
        ({"page_size": 0}, "page_size"),
        ({"prefil_token_s": 1}, "no number of a device is called 'prefil_token_s'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, change, said):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigError) as raised:
        read_device(str(path))
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"base_s": [1e999]}', '{"base_s": [NaN]}'])
def test_files_that_describe_no_device(tmp_path, content):
    path = tmp_path / "device.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_device(str(path))
    assert str(path) in str(raised.value)


def test_missing_numbers_are_named(tmp_path):
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"base_s": [0.1]}))
    with pytest.raises(ConfigError, match="decode_row_s is missing"):
        read_device(str(path))


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match=r"no device 'h200'.*a100-opt13b, h100-llama3-8b"):
        read_device("h200")
