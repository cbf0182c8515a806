"""A layer's MLP as many, of which each token goes through a few (Shazeer et al., "Outrageously
large neural networks", 2017; Jiang et al., "Mixtral of experts", 2024, section 2.1).

Of several devices each has some of the experts, or a part of each, and every token; what it does
not have counts as zero in the sum over all. So nothing is sent to where an expert is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import moe_grouped_matmul

from .config import ModelConfig
from .layers import Norm, activate
from .parts import EXPERT_INNER, EXPERTS, Axes, Parts


class Matrices(nnx.Module):
    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, axes: Axes = ()) -> None:
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=axes)


class Experts(nnx.Module):
    """Of `config`, which says what one device has. Matrices are [experts, in, out], never int8."""

    def __init__(self, config: ModelConfig, whole: ModelConfig, dtype: DTypeLike, parts: Parts):
        size, inner, count = config.hidden_size, config.intermediate_size, config.num_experts
        self.router = Matrices((whole.num_experts, size), dtype)
        cut = parts.axes(EXPERTS, None, EXPERT_INNER)
        self.gate = Matrices((count, size, inner), dtype, cut)
        self.up = Matrices((count, size, inner), dtype, cut)
        cut = parts.axes(EXPERTS, EXPERT_INNER, None)
        self.down = Matrices((count, inner, size), dtype, cut)
        self.config, self.parts = config, parts

    def __call__(
        self, x: jax.Array, live: jax.Array, norm: Norm, post_norm: Norm | None
    ) -> jax.Array:
        """x [rows, hidden_size] + post_norm(MLP of norm(x)); float32."""
        normed = norm(x)
        chosen, weights = self._route(normed)
        mixed = self.parts.sum(self._through(normed, chosen, weights, live))
        return x + (mixed if post_norm is None else post_norm(mixed))

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The best experts of each row and what each counts, both [rows, experts_per_token]."""
        router = self.router.weight[...].astype(jnp.float32)
        shares = jax.nn.softmax(jnp.dot(x, router.T, precision="highest"))
        weights, chosen = jax.lax.top_k(shares, self.config.experts_per_token)
        if self.config.norm_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return chosen, weights

    def _through(
        self, x: jax.Array, chosen: jax.Array, weights: jax.Array, live: jax.Array
    ) -> jax.Array:
        """Rows once for each of their experts, sorted by it; those of other devices' experts, and
        padding, stand behind all others and are nobody's."""
        count, each = self.config.num_experts, chosen.shape[1]
        gate, up, down = (matrices.weight[...] for matrices in (self.gate, self.up, self.down))
        first = self.parts.own_experts() * count
        own = chosen - first
        is_real = jnp.arange(len(x))[:, None] < live
        own = jnp.where((own >= 0) & (own < count) & is_real, own, count).reshape(-1)
        order = jnp.argsort(own, stable=True)
        sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
        rows = x[order // each].astype(gate.dtype)
        inner = activate(self.config.activation, moe_grouped_matmul(rows, gate, sizes))
        inner = (inner * moe_grouped_matmul(rows, up, sizes)).astype(gate.dtype)
        made = moe_grouped_matmul(inner, down, sizes)
        made = made[jnp.argsort(order)].reshape(len(x), each, -1)
        is_own = own.reshape(len(x), each, 1) < count
        return jnp.sum(jnp.where(is_own, made * weights[..., None], 0), axis=1)
