"""One step of training over a mesh: what lies where, and the program that changes it.

    data    copies of the model, each with some of the rows
    fsdp    the same, but every parameter divided among them (Rajbhandari et al., "ZeRO", 2020)
    tensor  parts of the matrices, all with the same rows

XLA divides the program by where its arguments lie, so a mesh changes no line of it. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fastserve_jax.errors import ConfigError

from .losses import Arrays, Loss

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
_BY_OUTPUT = ("qkv.weight", "gate_up.weight", "up.weight", "embed.weight", "head.weight")
_BY_INPUT = ("attn.out.weight", "mlp.down.weight")

type LossOf = Callable[[Arrays, Arrays, Arrays], Loss]
type StepOf = Callable[[Training, Arrays, Arrays], tuple[Training, Told]]


class Training(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # how many are done
    params: dict[str, jax.Array]
    moments: Any  # the optimiser's


class Told(NamedTuple):
    """Of a step or an evaluation, summed over the tokens that count."""

    nats: jax.Array
    tokens: jax.Array
    right: jax.Array
    gradient: jax.Array  # length of it, before it is clipped


def make_mesh(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> Mesh:
    """0: what the others leave, of `data`. Raises ConfigError."""
    fsdp, tensor = fsdp or 1, tensor or 1
    data = data or len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        raise ConfigError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not make {len(devices)} "
            "devices: the product must be their number"
        )
    return Mesh(np.array(devices).reshape(data, fsdp, tensor), (DATA, FSDP, TENSOR))


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> Spec:
    """A matrix by `tensor` along what comes out of it or goes into it, and along its longest other
    axis by `fsdp`; where that does not divide, not."""
    axes: list[str | None] = [None] * len(shape)
    if len(shape) > 1:
        by = 1 if name.endswith(_BY_INPUT) else 0 if name.endswith(_BY_OUTPUT) else None
        if by is not None and shape[by] % mesh.shape[TENSOR] == 0:
            axes[by] = TENSOR
        free = [axis for axis in range(len(shape)) if axes[axis] is None]
        free = [axis for axis in free if shape[axis] % mesh.shape[FSDP] == 0]
        if free:
            axes[max(free, key=lambda axis: shape[axis])] = FSDP
    return Spec(*axes)  # type: ignore[no-untyped-call]


def place(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    return {
        name: jax.device_put(array, NamedSharding(mesh, spec_of(name, array.shape, mesh)))
        for name, array in arrays.items()
    }


def place_batch(batch: Mapping[str, Any], mesh: Mesh, accumulate: int) -> dict[str, jax.Array]:
    """[rows, ...] -> [accumulate, rows / accumulate, ...], rows over `data` and `fsdp`."""
    spec = Spec(None, (DATA, FSDP))  # type: ignore[no-untyped-call]
    sharding = NamedSharding(mesh, spec)
    return {
        name: jax.device_put(array.reshape(accumulate, -1, *array.shape[1:]), sharding)
        for name, array in batch.items()
    }


@dataclass(frozen=True, slots=True)
class Steps:
    """`loss` of the arrays that are trained, of those that are not, and of a batch."""

    loss: LossOf
    optimiser: optax.GradientTransformation

    def begin(self, params: dict[str, jax.Array], mesh: Mesh) -> Training:
        """The optimiser's arrays lie as those they are for; what is of none, on every device."""
        everywhere = NamedSharding(mesh, Spec())  # type: ignore[no-untyped-call]
        lie = optax.tree.map_params(
            self.optimiser,
            lambda _, param: param.sharding,
            jax.eval_shape(self.optimiser.init, params),
            params,
            transform_non_params=lambda _: everywhere,
        )
        moments = jax.jit(self.optimiser.init, out_shardings=lie)(params)
        return Training(jax.device_put(jnp.int32(0), everywhere), params, moments)

    def compiled(self, now: Training) -> StepOf:
        """What it returns lies as `now`, so that one program does for every step."""
        lie = jax.tree.map(lambda array: array.sharding, now)
        return jax.jit(self._step, donate_argnums=0, out_shardings=(lie, None))

    def _step(self, now: Training, frozen: Arrays, batch: Arrays) -> tuple[Training, Told]:
        """Gradients of the mean over all that counts, however it is split up."""
        gradient = jax.value_and_grad(self.loss, has_aux=True)

        def add(total: Any, part: Arrays) -> tuple[Any, None]:
            (nats, (tokens, right)), slope = gradient(now.params, frozen, part)
            return jax.tree.map(jnp.add, total, (nats, tokens, right, slope)), None

        zero = jax.tree.map(jnp.zeros_like, now.params)
        counts = jnp.int32(0), jnp.int32(0)
        (nats, tokens, right, slope), _ = jax.lax.scan(add, (jnp.float32(0), *counts, zero), batch)
        slope = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), slope)
        length = optax.tree.norm(slope)
        updates, moments = self.optimiser.update(slope, now.moments, now.params)
        params: Any = optax.apply_updates(now.params, updates)
        told = Told(nats, tokens, right, length)
        return Training(now.step + 1, params, moments), told


def evaluation(loss: LossOf) -> Callable[[Arrays, Arrays, Arrays], Told]:
    @jax.jit
    def run(params: Arrays, frozen: Arrays, batch: Arrays) -> Told:
        nats, (tokens, right) = loss(params, frozen, batch)
        return Told(nats, tokens, right, jnp.float32(0))

    return run
