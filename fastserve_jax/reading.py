"""From a model's files onto its devices: as a whole, or to each device what it has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import State, abstract, all_axes, fill, parameters
from fastserve_jax.models.parts import Axes, Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.runtime.mesh import own_parts, parts_of, placed, replicas_of, spec_of
from fastserve_jax.weights.converted import parameters_as
from fastserve_jax.weights.load import ModelFiles
from fastserve_jax.weights.pieces import Cut, Parameter, pieces

type Report = Callable[[int, int], None]  # how many parameters are there, and of how many


@dataclass(frozen=True, slots=True)
class Division:
    """Of a model among the devices of a mesh."""

    mesh: Mesh

    @property
    def parts(self) -> Parts:
        """Of each replica."""
        return parts_of(self.mesh)

    @property
    def replicas(self) -> int:
        return replicas_of(self.mesh)


def read(
    files: ModelFiles,
    precision: Precision,
    empty: State,
    division: Division | None,
    folder: Path,
    report: Report,
) -> State:
    """The model's parameters on its devices, each of which has such ones as `empty`. `folder` keeps
    what converting made of a model that one device has whole. Raises what `ModelFiles.tensors`
    does."""
    wanted = parameters(empty)
    arrays: dict[str, jax.Array] = {}
    each: Iterator[tuple[str, jax.Array]]
    if division is None:
        each = ((name, jax.device_put(a)) for name, a in parameters_as(files, wanted, folder))
    else:
        each = _divided(files, precision, division, dict(zip(wanted, all_axes(empty), strict=True)))
    for done, (name, array) in enumerate(each, 1):
        arrays[name] = array
        report(done, len(wanted))
    return fill(empty, arrays)


def _divided(
    files: ModelFiles, precision: Precision, division: Division, axes: dict[str, Axes]
) -> Iterator[tuple[str, jax.Array]]:
    config, mesh = files.config, division.mesh
    whole = parameters(abstract(config, precision)[1])
    own = own_parts(mesh)
    wanted = {
        name: Parameter(
            whole[name].shape, whole[name].dtype, _cuts(config, division.parts, axes[name], own)
        )
        for name in axes
    }
    for name, made in pieces(files, wanted):
        each = made if wanted[name].cuts else made * len(own)
        of_part: dict[int, Any] = dict(zip(own, each, strict=True))
        yield name, placed(mesh, spec_of(axes[name]), of_part.__getitem__)


def _cuts(config: ModelConfig, parts: Parts, axes: Axes, own: list[int]) -> tuple[Cut, ...]:
    if not any(axes):
        return ()
    return tuple(
        Cut(tuple(parts.ranges(axis, config, part) if axis else None for axis in axes))
        for part in own
    )
