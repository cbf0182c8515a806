"""Ragged paged attention in plain XLA: the CPU's implementation, and every platform's oracle.

Ragged outside, blocked inside: decode rows (one query each) form one block, each stretch of a
prefill chunk another, and all walk their pages in blocks with a trip count known at run time. So
neither costs what the longest possible context would, and a row's sums are taken in the same
order whatever stands beside it. Softmax is accumulated block by block (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
_LAST = 2**31 - 1


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
    block_kv: int = 256,
    block_q: int = 64,
) -> jax.Array:
    """Causal attention of new tokens over their sequences' pages (already written, see write_kv).

    q            [tokens, num_heads, head_dim]; row r owns tokens cu_q_lens[r]:cu_q_lens[r+1]
    kv_pages     as in KVLayout
    kv_lens      [rows] int32, length of each sequence with its new tokens
    page_table   [rows, pages_per_row] int32; entries behind a sequence's end are never used
    cu_q_lens    [rows + 1] int32
    distribution [2] int32: rows [0, d0) have one token each, at token r; rows [d0, d1) any number
    window       a token sees itself and the window - 1 before it; 0 sees everything before it
    Returns [tokens, num_heads, head_dim] in q's dtype; tokens of no row hold no meaning.
    """
    tokens, rows = q.shape[0], kv_lens.shape[0]
    pages_per_block = max(1, min(block_kv // kv_pages.shape[3], page_table.shape[1]))
    spare = -page_table.shape[1] % pages_per_block
    page_table = jnp.pad(page_table, ((0, 0), (0, spare)))
    attend = partial(_attend, kv_pages, scale=scale, window=window, pages_per_block=pages_per_block)

    if tokens <= rows:  # so few that each token may walk its sequence's pages by itself
        at = jnp.arange(tokens)
        own = jnp.minimum(row_of_token(cu_q_lens, tokens), rows - 1)
        positions = kv_lens[own] - cu_q_lens[own + 1] + at
        lens = jnp.where(at < cu_q_lens[distribution[1]], positions + 1, 0)
        return attend(q[:, None], page_table[own], positions, lens)[:, 0]

    lens = jnp.where(jnp.arange(rows) < distribution[0], kv_lens, 0)
    decoded = attend(q[:rows, None], page_table, lens - 1, lens)[:, 0]
    block_q = min(block_q, tokens)
    padded = jnp.pad(q, ((0, block_q), (0, 0), (0, 0)))  # a last block may reach past the end
    out = lax.dynamic_update_slice(jnp.zeros_like(padded), decoded, (0, 0, 0))

    def chunk(row: jax.Array, out: jax.Array) -> jax.Array:
        first, end = cu_q_lens[row], cu_q_lens[row + 1]

        def stretch(i: jax.Array, out: jax.Array) -> jax.Array:
            # A stretch may overrun its row; the next row's, written later, puts that right.
            at = first + i * block_q
            block = lax.dynamic_slice_in_dim(padded, at, block_q)[None]
            position = kv_lens[row] - (end - at)
            length = jnp.minimum(kv_lens[row], position + block_q)
            table = lax.dynamic_slice_in_dim(page_table, row, 1)
            got = attend(block, table, position[None], length[None])
            updated: jax.Array = lax.dynamic_update_slice_in_dim(out, got[0], at, 0)
            return updated

        stretches = (end - first + block_q - 1) // block_q
        done: jax.Array = lax.fori_loop(0, stretches, stretch, out)
        return done

    filled: jax.Array = lax.fori_loop(distribution[0], distribution[1], chunk, out)
    return filled[:tokens]


def row_of_token(cu_q_lens: jax.Array, tokens: int) -> jax.Array:
    """[tokens] int32; `rows` for tokens behind the last row. A comparison with each row's end: a
    search would be a loop, which a compiler cannot share between layers."""
    at = jnp.arange(tokens)[:, None]
    return jnp.sum(cu_q_lens[1:] <= at, axis=1, dtype=jnp.int32)


def _attend(
    kv_pages: jax.Array,
    q: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    window: int,
    pages_per_block: int,
) -> jax.Array:
    """q [rows, queries, num_heads, head_dim] at positions[r] + 0, 1, ... over kv_lens[r] keys."""
    rows, queries, num_heads, head_dim = q.shape
    num_pages, _, num_kv_heads, page_size, _ = kv_pages.shape
    group = num_heads // num_kv_heads
    block = pages_per_block * page_size
    # [page and kind and head, page_size, head_dim]: gathered in the order the products want
    flat = kv_pages.reshape(num_pages * 2 * num_kv_heads, page_size, head_dim)
    q = q.reshape(rows, queries, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, num_kv_heads, group * queries, head_dim)
    at = positions[:, None] + jnp.arange(queries)  # [rows, queries]

    def gather(pages: jax.Array, kind: int) -> jax.Array:
        heads = kind * num_kv_heads + jnp.arange(num_kv_heads)
        index = pages[:, None, :] * (2 * num_kv_heads) + heads[:, None]  # [rows, heads, pages]
        return flat[index].reshape(rows, num_kv_heads, block, head_dim)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, total, out = carry
        pages = lax.dynamic_slice_in_dim(page_table, i * pages_per_block, pages_per_block, 1)
        scores = scale * jnp.einsum(
            "rkqd,rksd->rkqs", q, gather(pages, 0), preferred_element_type=jnp.float32
        )
        past = i * block + jnp.arange(block)
        seen = (past <= at[..., None]) & (past < kv_lens[:, None, None])
        if window:
            seen &= past > at[..., None] - window
        seen = jnp.tile(seen, (1, group, 1))[:, None]  # [rows, 1, group * queries, block]
        higher = jnp.maximum(best, jnp.where(seen, scores, _FAR).max(-1))
        # Masked explicitly: in a block where nothing is seen yet, exp(_FAR - _FAR) would be 1.
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        fade = jnp.exp(best - higher)
        # Rows beyond a sequence's end are another's or garbage; 0 * nan is nan.
        kept = (past < kv_lens[:, None])[:, None, :, None]
        values = jnp.where(kept, gather(pages, 1), 0)
        gained = jnp.einsum(
            "rkqs,rksd->rkqd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        return higher, total * fade + weights.sum(-1), out * fade[..., None] + gained

    first = jnp.min(jnp.where(kv_lens > 0, positions, _LAST))
    low = jnp.maximum(first - window + 1, 0) // block if window else 0
    high = (jnp.max(kv_lens) + block - 1) // block
    shape = (rows, num_kv_heads, group * queries)
    start = (jnp.full(shape, _FAR), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, out = lax.fori_loop(low, high, step, start)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    out = out.reshape(rows, num_kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    result: jax.Array = out.reshape(rows, queries, num_heads, head_dim).astype(q.dtype)
    return result
