"""Each operation in plain jnp, one sequence at a time: slow, and obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def ragged_paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    scale: float,
    window: int = 0,
) -> jax.Array:
    """Same contract as `xla.ragged_paged_attention`, outside jit; tokens of no row give zeros."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = kv_pages.shape[2]
    out = jnp.zeros(q.shape, jnp.float32)
    for row in range(int(distribution[1])):
        first, end = int(cu_q_lens[row]), int(cu_q_lens[row + 1])
        kv_len = int(kv_lens[row])
        own = kv_pages[page_table[row]].astype(jnp.float32)  # [pages, 2, heads, page_size, dim]
        flat = own.transpose(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :kv_len]
        keys, values = jnp.repeat(flat, num_heads // num_kv_heads, axis=1)
        at = np.arange(kv_len - (end - first), kv_len)[:, None]
        past = np.arange(kv_len)[None]
        seen = (past <= at) & ((past > at - window) if window else True)
        scores = jnp.einsum("thd,hsd->hts", q[first:end].astype(jnp.float32), keys) * scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        out = out.at[first:end].set(jnp.einsum("hts,hsd->thd", weights, values))
    return out.astype(q.dtype)
