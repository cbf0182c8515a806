"""Programs over a mesh of devices: what lies where, and the same program on each for its share.

    data    replicas: each has its own slots, pages and rows of a step, all numbered from 0
    model   the parts of one replica; see models/parts.py

A program is written for one device, with the shapes that one has; here it becomes the program of
all, with the shapes of all. Knows no particular program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fastserve_jax.models.parts import HEADS, INNER, MODEL, VOCAB, Axes

from .shapes import Program, like

DATA = "data"
_RULES = {HEADS: MODEL, INNER: MODEL, VOCAB: MODEL}


def _spec(*axes: str | None) -> Spec:
    return Spec(*axes)  # type: ignore[no-untyped-call]


REPLICAS = _spec(DATA)  # anything with a row for each slot, token or page of a replica
PAGES = _spec(DATA, MODEL)  # as KVLayout says


def make_mesh(devices: Sequence[Any], data: int, model: int) -> Mesh:
    """Neighbours, as jax lists them, are parts of one replica."""
    return Mesh(np.array(devices).reshape(data, model), (DATA, MODEL))


def spec_of(axes: Axes) -> Spec:
    return _spec(*(_RULES[axis] if axis else None for axis in axes))


def over(program: Program, mesh: Mesh) -> Program:
    """`program` on each device of `mesh`, its `specs` saying of what each has a share."""
    assert program.specs is not None, f"{program.name} does not say how it is divided"
    given, returned = program.specs

    def whole(spec: Spec, of_one: Any) -> Any:
        def grown(x: Any) -> Any:
            sizes = [mesh.shape[axis] if axis else 1 for axis in spec]
            sizes += [1] * (len(x.shape) - len(sizes))
            shape = tuple(a * b for a, b in zip(x.shape, sizes, strict=True))
            return like(shape, x.dtype, NamedSharding(mesh, spec))

        return jax.tree.map(grown, of_one)

    is_spec = lambda x: isinstance(x, Spec)  # noqa: E731
    args = jax.tree.map(whole, given, program.args, is_leaf=is_spec)
    # Kernels say nothing of which of their results are alike on all devices.
    function = jax.shard_map(
        program.function, mesh=mesh, in_specs=given, out_specs=returned, check_vma=False
    )
    return replace(program, function=function, args=args)
