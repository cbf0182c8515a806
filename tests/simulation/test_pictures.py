"""Pictures are drawn for whatever a study holds, and show what it found."""

import struct

import pytest

from fastserve_jax.core.simulate import Sample
from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.canvas import PALETTE, looks, prepare_folder
from fastserve_jax.simulation.devices import read_device
from fastserve_jax.simulation.pictures import draw
from fastserve_jax.simulation.run import Cell, Source, run_cell
from fastserve_jax.simulation.timeline import _levels

pytest.importorskip("matplotlib", reason="the extra `pictures` is not installed")

ALL = ["completion.png", "slo.png", "by-length.png", "timeline.png"]


def outcomes(policies=("fcfs", "mlfq"), rhos=(0.7, 1.1), **more):
    device = read_device("a100-opt13b")
    source = Source("poisson:n=30,rate=1;in=fixed:20;out=uniform:5:40")
    settings = {"slots": 2, "timeline": True} | more
    return [
        run_cell(Cell(source, policy, device, rho=rho, **settings), 2.0)
        for rho in rhos
        for policy in policies
    ]


def size(path):
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize(
    ("made", "names"),
    [
        ({}, ALL),
        ({"rhos": (0.5, 0.7, 0.9, 1.1)}, ALL),
        ({"policies": ("adaptive",), "rhos": (None,)}, ALL),
        ({"until_s": 0.01}, ALL),  # nobody finished
        ({"timeline": False}, ALL[:3]),
    ],
)
def test_every_study_has_its_pictures(tmp_path, made, names):
    paths = draw(outcomes(**made), tmp_path)
    assert [path.name for path in paths] == names
    for path in paths:
        width, height = size(path)
        assert width > 900
        assert height > 400
        assert path.stat().st_size > 20_000


def test_a_policy_looks_the_same_everywhere_and_like_no_other():
    names = [f"policy {i}" for i in range(2 * len(PALETTE))]
    chosen = looks(names)
    assert len(set(chosen.values())) == len(names)
    assert looks(names[:3]) == {name: chosen[name] for name in names[:3]}


def test_levels_beyond_those_shown_are_one():
    samples = [
        Sample(0.0, 1, 0, 0, 0, 0, (1,), {}),
        Sample(1.0, 1, 0, 0, 0, 0, (0, 2, *[1] * 8, 0), {}),
    ]
    shown = _levels(samples)
    assert [level.tolist() for level in shown] == [[1, 0], [0, 2], [0, 1], [0, 1], [0, 1], [0, 5]]
    assert _levels([Sample(0.0, 1, 0, 0, 0, 0, (), {})]) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--pictures"):
        prepare_folder(tmp_path / "file" / "p")
