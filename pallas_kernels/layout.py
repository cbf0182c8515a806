"""How keys and values lie in pages, and how new ones get there. Knows no model and no request."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .target import target


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One layer's pages: [num_pages, num_kv_heads, page_size, row], a row being a head's key and
    then its value of one token, and nothing behind them up to a multiple of `lanes`.

    A head's rows within a page are contiguous: one copy of (page, head) brings the operands of both
    products and nothing has to be transposed. Side by side, heads of 64 fill a TPU's 128 lanes; of
    rows that do not fill them XLA would make a copy of another layout for every call of a kernel.
    """

    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    lanes: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        row = -(-2 * self.head_dim // self.lanes) * self.lanes
        return (self.num_pages, self.num_kv_heads, self.page_size, row)

    def page_bytes(self, dtype: DTypeLike) -> int:
        return math.prod(self.shape[1:]) * jnp.dtype(dtype).itemsize


def write_kv(
    kv_pages: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    kv_scales: jax.Array | None = None,
) -> jax.Array:
    """Store one row per token at (page, offset); a page number out of range drops its row.

    kv_pages as in KVLayout; keys, values [tokens, num_kv_heads, head_dim]; pages, offsets
    [tokens] int32; kv_scales [2, num_kv_heads] float32, by which keys and values are divided.
    In place where `kv_pages` is donated.
    """
    if kv_scales is not None:
        keys, values = keys / kv_scales[0, :, None], values / kv_scales[1, :, None]
    rows = jnp.concatenate([keys, values], axis=-1)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, kv_pages.shape[3] - rows.shape[2])))
    if jnp.issubdtype(kv_pages.dtype, jnp.integer):
        most = 2 ** (8 * kv_pages.dtype.itemsize - 1) - 1
        rows = jnp.clip(jnp.round(rows), -most, most)
    rows = rows.astype(kv_pages.dtype)
    if target().platform == "tpu" and kv_pages.shape[2] % (32 // kv_pages.dtype.itemsize) == 0:
        from . import tpu

        written: jax.Array = tpu.write_rows(kv_pages, rows, pages, offsets)
        return written
    return kv_pages.at[pages, :, offsets].set(rows, mode="drop")
