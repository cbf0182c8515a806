"""Programs over a mesh of devices: what lies where, and the same program on each for its share.

    data    replicas: each has its own slots, pages and rows of a step, all numbered from 0
    expert  groups of a replica's experts, and
    model   the parts of each, both of all else; see models/parts.py

A program is written for one device, with the shapes that one has; here it becomes the program of
all, with the shapes of all. What the host gives it or is told by it is there once for each replica:
stacked where there are several, and alike on all devices, so that any host of a group may read it.
Knows no particular program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as Spec
from jax.typing import DTypeLike
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.parts import EXPERT, EXPERT_INNER, EXPERTS, MODEL, Axes, Parts

from .shapes import Program, like

DATA = "data"
_PARTS = (EXPERT, MODEL)
_SPLITTING = {"allow_split_physical_axes": True}
_RULES = {EXPERTS: EXPERT, EXPERT_INNER: MODEL}  # from what a parameter is divided by to the mesh


def _spec(*axes: str | tuple[str, ...] | None) -> Spec:
    return Spec(*axes)  # type: ignore[no-untyped-call]


REPLICAS = _spec(DATA)  # anything with a row for each slot, token or page of a replica
PAGES = _spec(DATA, _PARTS)  # as KVLayout says
HOST_PAGES = _spec((DATA, *_PARTS))  # each device's behind each other
HOST: Final = "host"  # what the host gives, or is told


def make_mesh(devices: Sequence[Any], data: int, model: int, expert: int = 1) -> Mesh:
    """As near to each other as devices can be, what is parts of one replica, and of one group of
    experts; of several slices, which are far from each other, each has whole replicas."""
    slices = slices_of(devices)
    assert data % slices == 0, "a replica is within one slice"
    if devices[0].platform != "tpu":
        made = np.array(devices).reshape(data, expert, model)
    elif slices > 1:
        within, between = (data // slices, expert, model), (slices, 1, 1)
        made = mesh_utils.create_hybrid_device_mesh(within, between, devices, **_SPLITTING)
    else:
        made = mesh_utils.create_device_mesh((data, expert, model), devices, **_SPLITTING)
    return Mesh(made, (DATA, EXPERT, MODEL))


def slices_of(devices: Sequence[Any]) -> int:
    """Of a TPU, joined by the data centre's network. XLA numbers the hosts of GPUs so, too, which
    a replica may well span."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def parts_of(mesh: Mesh) -> Parts:
    return Parts(mesh.shape[EXPERT] * mesh.shape[MODEL], mesh.shape[EXPERT])


def choose_axes(
    config: ModelConfig, devices: int, asked: Mapping[str, int], slices: int = 1
) -> dict[str, int]:
    """Replicas and parts for so many devices. Without being asked (0): as many parts as divide the
    model with each KV head on two devices at the most, experts divided whole as far as they go,
    and the rest replicas, of which every slice has as many. Raises ConfigError for a mesh that
    cannot be."""
    data, expert, model = (asked.get(axis, 0) for axis in (DATA, *_PARTS))
    most = devices // (data or slices)
    if expert > 1 and not config.num_experts:
        raise ConfigError("the model has no experts to be divided: leave expert out of the mesh")
    if not (expert and model):
        known = expert or model or 1
        counts = [n for n in range(known, most + 1, known) if _divides(config, most, n)]
        count = max(counts, default=known)
        if not model:
            expert = expert or _groups(config, count)
            model = count // expert
        else:
            expert = _groups(config, count // model)
    try:
        Parts(expert * model, expert).of(config)
    except ConfigError as error:
        known_to = " or ".join(f"{n}" for n in range(1, most + 1) if _divides(config, most, n))
        raise ConfigError(f"{error}; among {known_to} they do") from error
    data = data or devices // (expert * model)
    if data < 1 or data * expert * model != devices:
        named = f"data={data}, expert={expert}, model={model}"
        raise ConfigError(
            f"a mesh of {named} does not make {devices} devices: the product must be their number"
        )
    if data % slices:
        raise ConfigError(f"{data} replicas do not divide among {slices} slices")
    return {DATA: data, EXPERT: expert, MODEL: model}


def _groups(config: ModelConfig, parts: int) -> int:
    """Of experts: as many as divide them and the parts."""
    return math.gcd(config.num_experts, parts) if config.num_experts else 1


def _divides(config: ModelConfig, devices: int, count: int) -> bool:
    """Experts do, whole, before their inner columns."""
    try:
        Parts(count, _groups(config, count)).of(config)
    except ConfigError:
        return False
    return devices % count == 0 and count <= 2 * config.num_kv_heads


def replicas_of(mesh: Mesh | None) -> int:
    return 1 if mesh is None else int(mesh.shape[DATA])


def spec_of(axes: Axes) -> Spec:
    return _spec(*(axis and _RULES.get(axis, _PARTS) for axis in axes))


def over(program: Program, mesh: Mesh) -> Program:
    """`program` on each device of `mesh`, its `specs` saying of what each has a share."""
    assert program.specs is not None, f"{program.name} does not say how it is divided"
    given, returned = program.specs
    replicas = replicas_of(mesh)

    def whole(spec: Spec | str, of_one: Any) -> Any:
        return jax.tree.map(lambda x: _grown(x, spec, mesh), of_one)

    def own(spec: Spec | str, args: Any) -> Any:
        if spec != HOST or replicas == 1:
            return args
        return jax.tree.map(lambda x: x[lax.axis_index(DATA)], args)

    def told(spec: Spec | str, results: Any) -> Any:
        if spec != HOST or replicas == 1:
            return results
        return jax.tree.map(lambda x: lax.all_gather(x, DATA), results)

    def function(*args: Any) -> Any:
        results = program.function(*_by_spec(own, given, args))
        return _by_spec(told, returned, results)

    # Kernels say nothing of which of their results are alike on all devices.
    sharded = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=_by_spec(lambda spec, _: _known(spec), given, given),
        out_specs=_by_spec(lambda spec, _: _known(spec), returned, returned),
        check_vma=False,
    )
    args = _by_spec(whole, given, program.args)
    return replace(program, function=sharded, args=args, placed=_placed(program, mesh))


def _is_spec(x: Any) -> bool:
    return isinstance(x, Spec | str)


def _by_spec(made: Any, specs: Any, trees: Any) -> Any:
    return jax.tree.map(made, specs, trees, is_leaf=_is_spec)


def _known(spec: Spec | str) -> Spec:
    return _spec() if isinstance(spec, str) else spec


def _grown(x: Any, spec: Spec | str, mesh: Mesh) -> Any:
    """What all devices have together, if each has an `x`."""
    kind = x.sharding.memory_kind if x.sharding is not None else None
    if isinstance(spec, str):
        replicas = replicas_of(mesh)
        shape = (replicas, *x.shape) if replicas > 1 else x.shape
        return like(shape, x.dtype, NamedSharding(mesh, _spec(), memory_kind=kind))
    sizes = [_size(mesh, axis) for axis in spec]
    sizes += [1] * (len(x.shape) - len(sizes))
    shape = tuple(a * b for a, b in zip(x.shape, sizes, strict=True))
    return like(shape, x.dtype, NamedSharding(mesh, spec, memory_kind=kind))


def _size(mesh: Mesh, axes: Any) -> int:
    names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    return int(np.prod([mesh.shape[name] for name in names]))


def _placed(program: Program, mesh: Mesh) -> Any:
    """Where its results lie, if that is another memory than the device's."""
    if program.placed is None:
        return None
    assert program.specs is not None
    specs = program.specs[1]
    kinds = program.placed if isinstance(program.placed, tuple) else (program.placed,) * len(specs)
    return tuple(
        NamedSharding(mesh, _known(spec), memory_kind=there.memory_kind)
        for spec, there in zip(specs, kinds, strict=True)
    )


def zeros(
    mesh: Mesh, spec: Spec, of_one: tuple[int, ...], dtype: DTypeLike, count: int
) -> list[jax.Array]:
    """So many, made by the devices, each of which has as much as `of_one` says."""
    whole = _grown(like(of_one, dtype), spec, mesh)
    make = jax.jit(
        lambda: [jnp.zeros(whole.shape, dtype) for _ in range(count)],
        out_shardings=[whole.sharding] * count,
    )
    made: list[jax.Array] = make()
    return made


def alike(mesh: Mesh, spec: Spec, of_one: Any) -> jax.Array:
    """Each device has the same `of_one`, of what `spec` divides among them."""
    array = np.asarray(of_one)
    return placed(mesh, spec, lambda _: array)


def placed(
    mesh: Mesh, spec: Spec, of_part: Callable[[int], NDArray[Any]], kind: str | None = None
) -> jax.Array:
    """What each device of this process has is what `of_part` makes for its part of a replica."""
    sharding = NamedSharding(mesh, spec, memory_kind=kind)
    here = sharding.addressable_devices
    arrays = []
    for device, part in _numbered(mesh):
        if device in here:
            there = SingleDeviceSharding(device, memory_kind=kind)
            arrays.append(jax.device_put(of_part(part), there))
    shape = _grown(like(arrays[0].shape, arrays[0].dtype), spec, mesh).shape
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def own_parts(mesh: Mesh) -> list[int]:
    """Those of a replica that devices of this process have."""
    own = jax.process_index()
    return sorted({part for device, part in _numbered(mesh) if device.process_index == own})


def _numbered(mesh: Mesh) -> Iterator[tuple[jax.Device, int]]:
    """Each device, and which part of its replica it has."""
    for replica in mesh.devices:
        for part, device in enumerate(replica.flat):
            yield device, part
