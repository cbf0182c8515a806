"""How keys and values lie in pages, and how new ones get there. Knows no model and no request."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One layer's pages: [num_pages, 2 (key, value), num_kv_heads, page_size, head_dim].

    A head's rows within a page are contiguous, so one gather of (page, kind, head) triples brings
    the operand of a matrix product and nothing has to be transposed.
    """

    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)

    def page_bytes(self, dtype: DTypeLike) -> int:
        per_token = 2 * self.num_kv_heads * self.head_dim
        return per_token * self.page_size * jnp.dtype(dtype).itemsize


def write_kv(
    kv_pages: jax.Array, keys: jax.Array, values: jax.Array, pages: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Store one row per token at (page, offset); a page number out of range drops its row.

    kv_pages as in KVLayout; keys, values [tokens, num_kv_heads, head_dim]; pages, offsets
    [tokens] int32. In place where `kv_pages` is donated.
    """
    rows = jnp.stack([keys, values], axis=1).astype(kv_pages.dtype)  # [tokens, 2, heads, dim]
    return kv_pages.at[pages, :, :, offsets].set(rows, mode="drop")
