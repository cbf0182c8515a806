"""What steps cost is measured once, and believed later only while it holds."""

from dataclasses import replace

import msgspec
import pytest

from fastserve_jax.runtime import kept
from fastserve_jax.runtime.calibrate import calibrate
from fastserve_jax.runtime.measured import measured
from tests.runtime.test_calibrate import SHAPE, TRUTH, KnownRunner, near


def start(folder, costs=TRUTH, facts="a model", shape=SHAPE):
    """-> the model found, and how many steps it took."""
    runner = KnownRunner(shape, costs, first_s=0.2)
    found = measured(
        runner, folder, facts, lambda r: calibrate(r, clock=runner.clock), runner.clock
    )
    return found, sum(bool(plan.work) for plan in runner.plans)


def test_a_second_start_finds_the_same_in_a_few_steps(tmp_path):
    first, many = start(tmp_path)
    second, few = start(tmp_path)
    assert second == first
    assert first.base_s == near(TRUTH.base_s)
    assert many > 10
    assert few == 4  # two, and once more each because its program was new


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_what_holds_no_more_is_measured_again(tmp_path, factor):
    start(tmp_path)
    costs = replace(
        TRUTH, base_s=[factor * s for s in TRUTH.base_s], decode_row_s=factor * TRUTH.decode_row_s
    )
    for is_kept in (False, True):
        found, steps = start(tmp_path, costs)
        assert found.base_s[0] == near(costs.base_s[0], 0.1)
        assert (steps == 4) == is_kept


def test_another_model_or_shape_is_another_file(tmp_path):
    start(tmp_path)
    assert start(tmp_path, facts="another model")[1] > 10
    assert start(tmp_path, shape=replace(SHAPE, max_slots=16))[1] > 10
    assert len(list(tmp_path.iterdir())) == 3


def changed(**terms):
    return lambda data: msgspec.json.encode({**msgspec.json.decode(data), **terms})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"[]",
        changed(buckets=[1]),
        changed(base_s=[0.0] * 5),
        changed(base_s=[0.01]),
        changed(decode_row_s=-1.0),
        changed(kv_token_s="much"),
    ],
)
def test_what_makes_no_sense_is_measured_again(tmp_path, damage):
    first, many = start(tmp_path)
    (path,) = tmp_path.iterdir()
    kept.write(path, damage(kept.read(path)))
    assert start(tmp_path) == (first, many)
    assert start(tmp_path)[1] == 4


def test_bytes_are_as_written_or_not_there(tmp_path):
    path = tmp_path / "folder" / "file"
    assert kept.read(path) is None
    kept.write(path, b"some bytes")
    assert kept.read(path) == b"some bytes"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[:-1] + b"X", b"X" + whole[1:]):
        path.write_bytes(damaged)
        assert kept.read(path) is None
    (tmp_path / "file").write_bytes(b"")
    kept.write(tmp_path / "file" / "below", b"nowhere to write")
    assert kept.name_of("a", 1) == kept.name_of("a", 1) != kept.name_of("a1")
