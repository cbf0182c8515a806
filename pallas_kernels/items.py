"""What attention kernels walk: a sequence and a block of its queries at a time.

Plain jnp on the batch's arrays; the same for every layer of a step, so XLA computes it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Items(NamedTuple):
    """[items] int32 each, the first `real` of them to be attended. Item i attends the tokens
    first[i]:end[i] of block[i], the first of them at position[i] of the sequence row[i]."""

    real: jax.Array  # [1]
    row: jax.Array
    block: jax.Array
    first: jax.Array
    end: jax.Array
    position: jax.Array


def decode_items(kv_lens: jax.Array, rows: jax.Array) -> Items:
    """Rows [0, rows) with one token each, the last of their sequences; each a block by itself."""
    at = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    return Items(rows[None], at, at, jnp.zeros_like(at), jnp.ones_like(at), kv_lens - 1)


def chunk_items(
    kv_lens: jax.Array, cu_q_lens: jax.Array, rows: jax.Array, queries: int, tokens: int
) -> tuple[Items, jax.Array]:
    """Rows [rows[0], rows[1]) cut where blocks of `queries` tokens of the batch end; and of each
    token [tokens] the item it is in, any where it is in none."""
    most_rows = kv_lens.shape[0]
    start, stop = cu_q_lens[:-1], cu_q_lens[1:]
    at = jnp.arange(most_rows, dtype=jnp.int32)
    is_chunk = (at >= rows[0]) & (at < rows[1]) & (stop > start)
    low = start // queries
    counts = jnp.where(is_chunk, (stop - 1) // queries + 1 - low, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    # A row has as many blocks as it fills, and one more at most.
    most = -(-tokens // queries) + min(most_rows, tokens)
    item = jnp.arange(most, dtype=jnp.int32)
    # A comparison with each end: a search would be a loop.
    row = jnp.sum(ends <= item[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, most_rows - 1)
    block = low[row] + item - (ends - counts)[row]
    first = jnp.maximum(start[row], block * queries)
    end = jnp.minimum(stop[row], (block + 1) * queries)
    position = kv_lens[row] - (stop[row] - first)
    first, end = first - block * queries, end - block * queries
    token = jnp.arange(tokens, dtype=jnp.int32)
    own = jnp.minimum(jnp.sum(stop <= token[:, None], axis=1, dtype=jnp.int32), most_rows - 1)
    item_of = (ends - counts)[own] + token // queries - low[own]
    return Items(ends[-1:], row, block, first, end, position), item_of
