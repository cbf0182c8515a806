"""The parts of a decoder: linear maps, norms, rotary embedding. Arrays in, arrays out; no pages.

Weights live in the model's dtype, in int8 with a scale per output, or in fewer bits with scales by
stretch of the input; sums, norms and activations are float32, cast or quantised where a matrix
product begins. A matrix is [out, in]: both operands are contracted along their last axis. Where the
CPU has kernels for int8, a product is one call with all that stands around it, and rows of padding,
from `live` on, are not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import cpu, quant_matmul

from .adapters import Added
from .config import RopeScaling
from .parts import VOCAB, WHOLE, Axes, Parts
from .precision import Stored
from .spread import spreading


class Matrix(NamedTuple):
    """[out, in] of a float type; or int8 with `scale` [out] float32 and its input spread; or int8,
    int4 or fp8, widened where it is used, with `scale` [groups, out] float32."""

    weight: jax.Array
    scale: jax.Array | None = None

    @property
    def takes_int8(self) -> bool:
        """Activations of eight bits."""
        return self.scale is not None and self.scale.ndim == 1


class Linear(nnx.Module):
    """y = x W^T + b, [..., in] -> [..., out] float32. `axes` are those of W that are divided: by
    `out` each device has some of y, by `in` y is the sum over all of them. `watch` is told x."""

    watch: Callable[[jax.Array], None] | None = None

    def __init__(
        self,
        out: int,
        size: int,
        dtype: DTypeLike | Stored,
        bias: DTypeLike | None = None,
        axes: Axes = (None, None),
        parts: Parts = WHOLE,
    ) -> None:
        self.weight, self.scale = _matrix(out, size, dtype, parts.axes(*axes))
        bias_axes = parts.axes(axes[0])
        self.bias = None if bias is None else nnx.Param(jnp.zeros((out,), bias), axes=bias_axes)
        self.parts = parts if axes[1] is not None else WHOLE  # to be summed

    def __call__(
        self,
        x: jax.Array,
        live: jax.Array,
        *,
        norm: Norm | None = None,
        gate: str | None = None,
        add: jax.Array | None = None,
        add_norm: Norm | None = None,
        beside: Added | None = None,
    ) -> jax.Array:
        """x [rows, in] goes through `norm`, or is [rows, 2 in] and gated with the activation
        `gate`; then the map and what is `beside` it, then `add_norm`, and `add` [rows, out] is
        added."""
        if self.watch is not None:
            self.watch(entering(x, norm, gate))
        if beside is not None:
            y = self(x, live, norm=norm, gate=gate) + beside(entering(x, norm, gate))
            y = y if add_norm is None else add_norm(y)
            return y if add is None else add + y
        weight, scale = matrix = _held(self.weight, self.scale)
        other = self.bias is not None or any(isinstance(n, LayerNorm) for n in (norm, add_norm))
        kernel = matrix.takes_int8 and cpu.runs() and not other and self.parts.count == 1
        if kernel and scale is not None:
            norms = {"norm": for_kernel(norm), "add_norm": for_kernel(add_norm)}
            return cpu.int8_matmul(x, weight, scale, live, gate=gate, add=add, **norms)
        y = self.parts.sum(project(entering(x, norm, gate), matrix, live))
        y = y if self.bias is None else y + self.bias[...].astype(jnp.float32)
        y = y if add_norm is None else add_norm(y)
        return y if add is None else add + y


def entering(x: jax.Array, norm: Norm | None, gate: str | None) -> jax.Array:
    """What a map is applied to, [rows, in]; see Linear."""
    x = x if norm is None else norm(x)
    if gate is None:
        return x
    left, right = jnp.split(x, 2, axis=-1)
    return activate(gate, left) * right


def project(x: jax.Array, matrix: Matrix, live: jax.Array | int) -> jax.Array:
    """x [rows, in] times [out, in] -> [rows, out] float32."""
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    weight, scale = matrix
    if scale is None:
        return jax.lax.dot_general(
            x.astype(weight.dtype), weight, axes, preferred_element_type=jnp.float32
        )
    if not matrix.takes_int8:
        return quant_matmul(x.astype(jnp.bfloat16), weight, scale)
    if cpu.runs():
        return cpu.int8_matmul(x, weight, scale, jnp.int32(live))
    rows, row_scale = quantise(spread(x))
    return quant_matmul(rows, weight, scale[None], row_scale)


def best_output(
    x: jax.Array, matrix: Matrix, live: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """The highest of each row of `project`, NaN where there is one, and the first output that has
    it, without the product in memory; None where that cannot be had."""
    weight, scale = matrix
    if scale is None or not matrix.takes_int8 or not cpu.runs():
        return None
    return cpu.int8_best(x, weight, scale, live)


def drawn_output(
    x: jax.Array, matrix: Matrix, live: jax.Array
) -> Callable[[cpu.Rules], tuple[jax.Array, jax.Array]] | None:
    """The same for an output drawn from each row; None where that cannot be had."""
    weight, scale = matrix
    if scale is None or not matrix.takes_int8 or not cpu.runs():
        return None
    return lambda rules: cpu.int8_draw(x, weight, scale, live, rules)


def spread(x: jax.Array) -> jax.Array:
    """x [..., size], or what was spread back again; float32. See spread.py."""
    turn = spreading(x.shape[-1])
    x = x.astype(jnp.float32)
    return (x.reshape(-1, len(turn)) @ turn).reshape(x.shape)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row of x [..., in] to int8, and its scale [..., 1] float32."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    return jnp.round(x * inverse).astype(jnp.int8), scale


def _matrix(
    out: int, size: int, dtype: DTypeLike | Stored, axes: Axes
) -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array] | None]:
    scale = None
    if isinstance(dtype, Stored):
        shape = dtype.groups(size), out
        scale, dtype = nnx.Param(jnp.ones(shape, jnp.float32), axes=(None, axes[0])), dtype.dtype
    elif dtype == jnp.int8:
        # Where the input is divided, each part is quantised by itself.
        scale = nnx.Param(jnp.ones((out,), jnp.float32), axes=(axes[0] or axes[1],))
    return nnx.Param(jnp.zeros((out, size), dtype), axes=axes), scale


def _held(weight: nnx.Param[jax.Array], scale: nnx.Param[jax.Array] | None) -> Matrix:
    return Matrix(weight[...], None if scale is None else scale[...])


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.weight[...].astype(jnp.float32)


class LayerNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


type Norm = RMSNorm | LayerNorm


def for_kernel(norm: Norm | None) -> cpu.Norm | None:
    return None if norm is None else cpu.Norm(norm.weight[...], norm.eps)


class Embedding(nnx.Module):
    """Rows by their index. Where `parts` are many, each device has `count` of them."""

    def __init__(
        self, count: int, size: int, dtype: DTypeLike | Stored, parts: Parts = WHOLE
    ) -> None:
        self.weight, self.scale = _matrix(count, size, dtype, parts.axes(VOCAB, None))
        self.parts = parts

    def __call__(self, index: jax.Array) -> jax.Array:
        return self._own(index) if self.parts.count == 1 else self._of_all(index)

    def _own(self, index: jax.Array) -> jax.Array:
        rows = self.weight[...][index].astype(jnp.float32)
        if self.scale is None:
            return rows
        if self.scale.ndim == 1:
            return spread(rows * self.scale[...][index][:, None])
        scales = self.scale[...].T[index][..., None]  # [tokens, groups, 1]
        return (rows.reshape(*scales.shape[:2], -1) * scales).reshape(rows.shape)

    def _of_all(self, index: jax.Array) -> jax.Array:
        count = self.weight.shape[0]
        index = index - self.parts.own() * count
        is_own = (index >= 0) & (index < count)
        rows = self._own(jnp.clip(index, 0, count - 1))
        return self.parts.sum(jnp.where(is_own[..., None], rows, 0))


def activate(kind: str, x: jax.Array) -> jax.Array:
    if kind == "relu":
        return jax.nn.relu(x)
    return jax.nn.silu(x) if kind == "silu" else jax.nn.gelu(x, approximate=True)


def rope_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> jax.Array:
    """[head_dim / 2] float32 radians per position (Su et al., RoFormer, section 3.2.2)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    turns = scaling.original_context * frequencies / (2 * math.pi)
    blend = (turns - scaling.low) / (scaling.high - scaling.low)
    blend = jnp.clip(blend, 0.0, 1.0)  # 0: turns too slowly, stretch it; 1: leave it
    return frequencies * (blend + (1 - blend) / scaling.factor)


class Rotation(NamedTuple):
    """Of each token's position; every layer with the same base shares one. [tokens, 1, dim / 2]"""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate-half. x [tokens, heads, head_dim] float32 -> the same."""
    left, right = jnp.split(x, 2, axis=-1)
    turned = [left * by.cos - right * by.sin, right * by.cos + left * by.sin]
    return jnp.concatenate(turned, axis=-1)
