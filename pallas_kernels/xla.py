"""Ragged paged attention in plain XLA: the CPU's implementation, and every platform's oracle.

Ragged outside, blocked inside: decode rows (one query each) form one block, each stretch of a
prefill chunk another, and all walk their pages in blocks with a trip count known at run time. So
neither costs what the longest possible context would, and a row's sums are taken in the same
order whatever stands beside it. Softmax is accumulated block by block (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
_LAST = 2**31 - 1

Attended = jax.Array | tuple[jax.Array, jax.Array]


class _Rules(NamedTuple):
    """What ragged_paged_attention is told beside its arrays of rows."""

    scale: float
    window: int
    soft_cap: float
    sinks: jax.Array | None
    kv_scales: jax.Array | None
    with_lse: bool


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
    soft_cap: float = 0.0,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    with_lse: bool = False,
    block_kv: int = 256,
    block_q: int = 64,
) -> Attended:
    """Causal attention of new tokens over their sequences' pages (already written, see write_kv).

    q            [tokens, num_heads, head_dim]; row r owns tokens cu_q_lens[r]:cu_q_lens[r+1]
    kv_pages     as in KVLayout
    kv_lens      [rows] int32, length of each sequence with its new tokens
    page_table   [rows, pages_per_row] int32; entries behind a sequence's end are never used
    cu_q_lens    [rows + 1] int32
    distribution [2] int32: rows [0, d0) have one token each, at token r; rows [d0, d1) any number
    window       a token sees itself and the window - 1 before it; 0 sees everything before it
    soft_cap     scores become soft_cap * tanh(scores / soft_cap) (Gemma 2); 0 leaves them
    sinks        [num_heads] float32, a score of each head that has no value (GPT-OSS)
    kv_scales    [2, num_kv_heads] float32: stored keys and values are to be multiplied by it
    Returns [tokens, num_heads, head_dim] in q's dtype; tokens of no row hold no meaning. With
    `with_lse` also [tokens, num_heads] float32, the logarithm of the sum of the exponentials of a
    token's scores, sink included: parts of a context attended apart are merged by it.
    """
    tokens, rows = q.shape[0], kv_lens.shape[0]
    pages_per_block = max(1, min(block_kv // kv_pages.shape[2], page_table.shape[1]))
    spare = -page_table.shape[1] % pages_per_block
    page_table = jnp.pad(page_table, ((0, 0), (0, spare)))
    rules = _Rules(scale, window, soft_cap, sinks, kv_scales, with_lse)
    attend = partial(_attend, kv_pages, rules=rules, pages_per_block=pages_per_block)

    walk = (
        _each_token if tokens <= rows else partial(_rows_and_chunks, block_q=min(block_q, tokens))
    )
    out = walk(attend, q, kv_lens, page_table, cu_q_lens, distribution)
    return (out[..., :-1].astype(q.dtype), out[..., -1]) if with_lse else out


def _each_token(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
) -> jax.Array:
    """So few tokens that each may walk its sequence's pages by itself."""
    at = jnp.arange(q.shape[0])
    own = jnp.minimum(row_of_token(cu_q_lens, q.shape[0]), kv_lens.shape[0] - 1)
    positions = kv_lens[own] - cu_q_lens[own + 1] + at
    lens = jnp.where(at < cu_q_lens[distribution[1]], positions + 1, 0)
    return attend(q[:, None], page_table[own], positions, lens)[:, 0]


def _rows_and_chunks(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    block_q: int,
) -> jax.Array:
    """The rows of one token together, then stretch by stretch of every chunk."""
    rows = kv_lens.shape[0]
    lens = jnp.where(jnp.arange(rows) < distribution[0], kv_lens, 0)
    decoded = attend(q[:rows, None], page_table, lens - 1, lens)[:, 0]
    padded = jnp.pad(q, ((0, block_q), (0, 0), (0, 0)))  # a last block may reach past the end
    out = jnp.zeros((*padded.shape[:2], decoded.shape[-1]), decoded.dtype)
    out = lax.dynamic_update_slice(out, decoded, (0, 0, 0))

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
    return filled[: q.shape[0]]


def row_of_token(cu_q_lens: jax.Array, tokens: int) -> jax.Array:
    """[tokens] int32; `rows` for tokens behind the last row. A comparison with each row's end: a
    search would be a loop, which a compiler cannot share between layers."""
    at = jnp.arange(tokens)[:, None]
    return jnp.sum(cu_q_lens[1:] <= at, axis=1, dtype=jnp.int32)


def _gathered(kv_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """[rows, pages] -> [rows, num_kv_heads, pages * page_size, row], in the order products want."""
    num_pages, num_kv_heads, page_size, row = kv_pages.shape
    flat = kv_pages.reshape(num_pages * num_kv_heads, page_size, row)
    index = pages[:, None, :] * num_kv_heads + jnp.arange(num_kv_heads)[:, None]
    return flat[index].reshape(pages.shape[0], num_kv_heads, -1, row)


def _seen(past: jax.Array, at: jax.Array, kv_lens: jax.Array, window: int) -> jax.Array:
    """[rows, queries, block] bool: which of the positions `past` those at `at` see."""
    seen = (past <= at[..., None]) & (past < kv_lens[:, None, None])
    return seen & (past > at[..., None] - window) if window else seen


def _attend(
    kv_pages: jax.Array,
    q: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    kv_lens: jax.Array,
    *,
    rules: _Rules,
    pages_per_block: int,
) -> jax.Array:
    """q [rows, queries, num_heads, head_dim] at positions[r] + 0, 1, ... over kv_lens[r] keys.
    Where it is asked for, the logarithm stands behind each head's values, and all is float32."""
    window, soft_cap, kv_scales = rules.window, rules.soft_cap, rules.kv_scales
    rows, queries, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[1:3]
    group = num_heads // num_kv_heads
    block = pages_per_block * page_size
    q = q.reshape(rows, queries, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, num_kv_heads, group * queries, head_dim)
    at = positions[:, None] + jnp.arange(queries)  # [rows, queries]

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, total, out = carry
        pages = lax.dynamic_slice_in_dim(page_table, i * pages_per_block, pages_per_block, 1)
        found = _gathered(kv_pages, pages).astype(q.dtype)
        keys, values = found[..., :head_dim], found[..., head_dim : 2 * head_dim]
        scores = rules.scale * jnp.einsum(
            "rkqd,rksd->rkqs", q, keys, preferred_element_type=jnp.float32
        )
        if kv_scales is not None:
            scores *= kv_scales[0, :, None, None]
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        past = i * block + jnp.arange(block)
        seen = jnp.tile(_seen(past, at, kv_lens, window), (1, group, 1))[:, None]
        higher = jnp.maximum(best, jnp.where(seen, scores, _FAR).max(-1))
        # Masked explicitly: in a block where nothing is seen yet, exp(_FAR - _FAR) would be 1.
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        fade = jnp.exp(best - higher)
        # Rows beyond a sequence's end are another's or garbage; 0 * nan is nan.
        kept = (past < kv_lens[:, None])[:, None, :, None]
        values = jnp.where(kept, values, 0)
        gained = jnp.einsum(
            "rkqs,rksd->rkqd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        return higher, total * fade + weights.sum(-1), out * fade[..., None] + gained

    first = jnp.min(jnp.where(kv_lens > 0, positions, _LAST))
    low = jnp.maximum(first - window + 1, 0) // block if window else 0
    high = (jnp.max(kv_lens) + block - 1) // block
    shape = (rows, num_kv_heads, group * queries)
    best, total = jnp.full(shape, _FAR), jnp.zeros(shape)
    if rules.sinks is not None:
        sinks = jnp.repeat(rules.sinks.reshape(num_kv_heads, group), queries, axis=1)
        best, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape)
    start = (best, total, jnp.zeros((*shape, head_dim)))
    best, total, out = lax.fori_loop(low, high, step, start)
    total = jnp.where(total == 0, 1, total)
    out = out / total[..., None]
    if kv_scales is not None:
        out *= kv_scales[1, :, None, None]
    if rules.with_lse:
        out = jnp.concatenate([out, (best + jnp.log(total))[..., None]], axis=-1)
    out = out.reshape(rows, num_kv_heads, group, queries, -1).transpose(0, 3, 1, 2, 4)
    result: jax.Array = out.reshape(rows, queries, num_heads, -1)
    return result if rules.with_lse else result.astype(q.dtype)
