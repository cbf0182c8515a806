"""What is known of a call of attention on a GPU when it is compiled: the sizes of its blocks, how
threads hold what they multiply, and by which instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_BLOCK_BYTES = 1 << 15  # of keys and values: shared memory holds two blocks, and some such pairs
WARPS = 4  # of a block of threads; each multiplies sixteen rows at once


@dataclass(frozen=True)
class Rules:
    """What is known when it is compiled."""

    scale: float
    window: int
    soft_cap: float
    page_size: int
    head_dim: int
    kv_heads_each: int  # groups of query heads of one KV head
    row_warps: int  # that share the rows of a product; the others its columns
    own: int  # query heads of a group: rows of a product, one after the other, for each token
    parts: int  # of a sequence
    dtype: Any
    has_tma: bool
    by_wgmma: bool  # all four warps multiply sixty-four rows as one, with keys where they lie
    interpret: Any

    @property
    def rows(self) -> int:
        """Of a product."""
        return 16 * self.row_warps

    @property
    def keys(self) -> int:
        """Of a block."""
        row_bytes = 2 * self.head_dim * jnp.dtype(self.dtype).itemsize
        return 64 if self.by_wgmma or 64 * row_bytes <= _BLOCK_BYTES else 32

    @property
    def copies(self) -> int:
        """Of pages, or of the part of a page, that make up a block."""
        return max(1, self.keys // self.page_size)

    def layout(self, kind: str) -> Any:
        """How threads hold an operand: "LHS", "RHS" or "ACC"."""
        if self.by_wgmma:
            return plgpu.Layout.WGMMA
        return getattr(plgpu.Layout, f"MMA_{kind}")(self.dtype, m_warps=self.row_warps)

    def each_once(self, kind: str = "LHS") -> Any:
        """How threads hold a block of keys, or half of one."""
        warps = min(WARPS, self.keys // 16)
        return getattr(plgpu.Layout, f"MMA_{kind}")(self.dtype, m_warps=warps)

    def load(self, ref: Any, kind: str) -> jax.Array:
        loaded: jax.Array = plgpu.load(ref, layout=self.layout(kind), optimized=False)
        return loaded

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        layout = self.layout("ACC")
        layout = layout if len(shape) == 2 else layout.reduce(1)
        filled: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
        return filled

    def row_of(self, shape: tuple[int, ...]) -> jax.Array:
        """[rows, columns] int32, held as an operand on the right. Counted in one dimension: a
        thread holds two of its rows together, and an iota of two dimensions counts those as
        columns, as jax 0.12 has it (a GPU shows it; its interpreter does not)."""
        layout = self.layout("RHS").reduce(1)
        rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=layout)
        return self.spread(rows, shape, "RHS")

    def spread(self, rows: jax.Array, shape: tuple[int, ...], kind: str = "ACC") -> jax.Array:
        """What each row has, over its columns."""
        layout = self.layout(kind)
        spread: jax.Array = plgpu.layout_cast(lax.broadcast_in_dim(rows, shape, [0]), layout)
        return spread

    def wgmma(self, left: Any, right: Any, start: jax.Array | None = None) -> jax.Array:
        """`start` and `left` times `right`, which lies in shared memory as `left` may, too."""
        if self.interpret:  # which wants `left` there
            made = jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
            return made if start is None else start + made
        if start is None:
            return self.wgmma(left, right, self.full((left.shape[0], right.shape[1]), 0.0))
        add = pl.run_state(lambda sums: plgpu.wgmma(sums, left, right))
        summed: jax.Array = add(plgpu.WGMMAAccumulatorRef.init(start))
        return summed

    def product(self, left: jax.Array, right: jax.Array) -> jax.Array:
        if self.interpret:  # which has no mma.sync
            return jnp.dot(left, right, preferred_element_type=jnp.float32)
        made: jax.Array = plgpu.mma(self.full((left.shape[0], right.shape[1]), 0.0), left, right)
        return made
