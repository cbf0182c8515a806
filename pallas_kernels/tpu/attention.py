"""Ragged paged attention on a TPU (Mosaic): one kernel for rows of one token and for chunks.

The grid walks groups of KV heads, and in each of them items: a sequence and the block of its
queries that is attended at once. Of a row with one token that block is its query heads; of a chunk
it is a stretch of the batch's tokens, wherever rows begin, and each row with tokens in it is an item
of its own. Pages are copied one by one into a double buffer, only those that an item can see; the
first of an item are on their way while the one before it is computed. Tiles are as large as the
memory asked for allows: no table of chips.

Softmax is accumulated block by block (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). Knows no model and no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
_LANES = 128


class Items(NamedTuple):
    """What a kernel walks, [items] int32 each, the first `count` of them real. Item i attends the
    tokens first[i]:end[i] of block[i], the first of them at position[i], of row[i]."""

    count: jax.Array  # [1]
    row: jax.Array
    block: jax.Array
    first: jax.Array
    end: jax.Array
    position: jax.Array


@dataclass(frozen=True, slots=True)
class Tiles:
    heads: int  # KV heads of one grid step
    queries: int  # tokens of one block
    pages: int  # of one block of keys and values


@dataclass(frozen=True)
class _Kernel:
    """The refs of one grid step, and what is known when it is compiled."""

    tiles: Tiles
    scale: float
    window: int
    soft_cap: float
    items: Items
    table: Any  # SMEM [1, 1, pages_per_row] of this item's row
    next_table: Any  # of the item's after it
    q: Any  # VMEM [heads, a, b, head_dim]: a * b queries
    kv_pages: Any  # HBM, as in KVLayout
    sinks: Any  # VMEM [heads, queries, 1] or None
    out: Any  # as q
    lse: Any  # VMEM [heads, a, b, 1] or None
    best: Any  # VMEM f32 [heads, queries, 128], all lanes alike
    total: Any
    sum: Any  # VMEM f32 [heads, queries, head_dim]
    buffer: Any  # VMEM [2, heads, pages * page_size, 2 * head_dim]
    arrived: Any  # DMA semaphores [2]
    turn: Any  # SMEM [1]: blocks computed so far

    @property
    def block(self) -> int:
        return self.buffer.shape[2]

    @property
    def page_size(self) -> int:
        return self.block // self.tiles.pages

    def span(self, item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Blocks of keys that an item sees, from and to, and where its keys end."""
        items, window = self.items, self.window
        position = items.position[item]
        end = position + items.end[item] - items.first[item]
        low = jnp.maximum(position - window + 1, 0) // self.block if window else 0
        return low, (end + self.block - 1) // self.block, end

    def copies(self, table, group, at, end, slot, act) -> None:
        """`act` on the copy of each page of block `at` that holds keys before `end`."""
        tiles, page_size = self.tiles, self.page_size
        first = at * tiles.pages
        count = jnp.minimum((end + page_size - 1) // page_size - first, tiles.pages)

        def one(place: jax.Array, carry: None) -> None:
            heads = pl.ds(group * tiles.heads, tiles.heads)
            rows = pl.ds(pl.multiple_of(place * page_size, page_size), page_size)
            source = self.kv_pages.at[table[0, 0, first + place], heads]
            target = self.buffer.at[slot, :, rows]
            act(pltpu.make_async_copy(source, target, self.arrived.at[slot]))

        lax.fori_loop(0, count, one, None)

    def run(self) -> None:
        group, item = pl.program_id(0), pl.program_id(1)
        count, blocks = self.items.count[0], self.items.block
        low, high, end = self.span(item)

        @pl.when((group == 0) & (item == 0))
        def _() -> None:
            self.turn[0] = 0
            self.copies(self.table, group, low, end, 0, lambda copy: copy.start())

        @pl.when((item == 0) | (blocks[jnp.maximum(item - 1, 0)] != blocks[item]))
        def _() -> None:
            self.begin()

        lax.fori_loop(low, high, partial(self.step, group, item, high, end), None)

        @pl.when((item + 1 == count) | (blocks[jnp.minimum(item + 1, count - 1)] != blocks[item]))
        def _() -> None:
            self.finish()

    def begin(self) -> None:
        """A sink is a score without a value, there from the start."""
        if self.sinks is None:
            self.best[...] = jnp.full_like(self.best, _FAR)
            self.total[...] = jnp.zeros_like(self.total)
        else:
            self.best[...] = jnp.broadcast_to(self.sinks[...], self.best.shape)
            self.total[...] = jnp.ones_like(self.total)
        self.sum[...] = jnp.zeros_like(self.sum)

    def step(self, group, item, high, end, at, carry: None) -> None:
        """One block of keys: have the next one fetched, whoever's it is, and attend this one."""
        slot = lax.rem(self.turn[0], 2)
        self.turn[0] = self.turn[0] + 1

        @pl.when(at + 1 < high)
        def _() -> None:
            self.copies(self.table, group, at + 1, end, 1 - slot, lambda copy: copy.start())

        is_last = item + 1 == self.items.count[0]
        next_group = jnp.where(is_last, group + 1, group)

        @pl.when((at + 1 == high) & (next_group < pl.num_programs(0)))
        def _() -> None:
            low, _, its_end = self.span(jnp.where(is_last, 0, item + 1))
            start = lambda copy: copy.start()  # noqa: E731
            self.copies(self.next_table, next_group, low, its_end, 1 - slot, start)

        self.copies(self.table, group, at, end, slot, lambda copy: copy.wait())

        @pl.when((at + 1) * self.block > end)
        def _() -> None:
            # What lies behind the end is another's or garbage; 0 * nan is nan.
            rows = at * self.block + lax.broadcasted_iota(jnp.int32, (1, self.block, 1), 1)
            block = self.buffer[slot]
            self.buffer[slot] = jnp.where(rows < end, block, jnp.zeros_like(block))

        seen = self.seen(item, at)
        for head in range(self.tiles.heads):
            self.attend(head, slot, seen)

    def seen(self, item, at) -> jax.Array:
        """[queries, block] bool: which keys which query may see; none, where it is not the item's."""
        items, queries = self.items, self.sum.shape[1]
        own = lax.broadcasted_iota(jnp.int32, (queries, 1), 0)
        token = lax.rem(own, self.tiles.queries)
        first = items.first[item]
        position = items.position[item] + token - first
        past = at * self.block + lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        seen = (past <= position) & (token >= first) & (token < items.end[item])
        if self.window:
            seen &= past > position - self.window
        return seen

    def attend(self, head: int, slot, seen: jax.Array) -> None:
        queries, head_dim = self.sum.shape[1:]
        q = self.q[head].reshape(queries, head_dim)
        kv = self.buffer[slot, head].astype(q.dtype)
        scores = self.scale * lax.dot_general(
            q, kv[:, :head_dim], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        if self.soft_cap:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        best = self.best[head][:, :1]
        higher = jnp.maximum(best, jnp.max(jnp.where(seen, scores, _FAR), 1, keepdims=True))
        # Masked explicitly: where nothing is seen yet, exp(_FAR - _FAR) would be 1.
        weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
        fade = jnp.exp(best - higher)
        gained = lax.dot_general(
            weights.astype(q.dtype),
            kv[:, head_dim:],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total = self.total[head][:, :1] * fade + jnp.sum(weights, 1, keepdims=True)
        self.sum[head] = self.sum[head] * fade + gained
        self.best[head] = jnp.broadcast_to(higher, self.best.shape[1:])
        self.total[head] = jnp.broadcast_to(total, self.total.shape[1:])

    def finish(self) -> None:
        total = self.total[:, :, :1]
        total = jnp.where(total == 0, 1.0, total)
        self.out[...] = (self.sum[...] / total).reshape(self.out.shape).astype(self.out.dtype)
        if self.lse is not None:
            lse = self.best[:, :, :1] + jnp.log(total)
            self.lse[...] = lse.reshape(self.lse.shape)


def _kernel(*refs, has_sinks: bool, with_lse: bool, **known) -> None:
    it = iter(refs)
    items = Items(*(next(it) for _ in Items._fields))
    table, next_table, q, kv_pages = (next(it) for _ in range(4))
    sinks = next(it) if has_sinks else None
    out = next(it)
    lse = next(it) if with_lse else None
    kernel = _Kernel(
        items=items,
        table=table,
        next_table=next_table,
        q=q,
        kv_pages=kv_pages,
        sinks=sinks,
        out=out,
        lse=lse,
        **dict(zip(("best", "total", "sum", "buffer", "arrived", "turn"), it, strict=True)),
        **known,
    )
    pl.when(pl.program_id(1) < items.count[0])(kernel.run)


def _call(
    q, kv_pages, page_table, items, sinks, tiles, queries_axis, *, with_lse, interpret, **known
):
    """q [num_kv_heads, a, b, head_dim], of which `queries_axis` is walked in blocks."""
    num_kv_heads, head_dim = q.shape[0], q.shape[3]
    page_size = kv_pages.shape[2]
    of_block = [tiles.heads, q.shape[1], q.shape[2], head_dim]
    of_block[queries_axis] = tiles.queries
    queries = of_block[1] * of_block[2]

    def now(item, items):
        return jnp.minimum(item, jnp.maximum(items.count[0] - 1, 0))

    def after(item, items):
        return jnp.where(item + 1 < items.count[0], item + 1, 0)

    def at_block(group, item, *scalars):
        items = Items(*scalars)
        block = items.block[now(item, items)]
        return (group, block, 0, 0) if queries_axis == 1 else (group, 0, block, 0)

    def row_of(which):
        def index(group, item, *scalars):
            items = Items(*scalars)
            return items.row[which(item, items)], 0, 0

        return pl.BlockSpec((1, 1, page_table.shape[1]), index, memory_space=pltpu.SMEM)

    in_specs = [
        row_of(now),
        row_of(after),
        pl.BlockSpec(tuple(of_block), at_block),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    table = page_table[:, None]
    operands = [table, table, q, kv_pages]
    if sinks is not None:
        in_specs.append(pl.BlockSpec((tiles.heads, queries, 1), lambda group, item, *_: (group, 0, 0)))
        operands.append(sinks)
    out_specs = [pl.BlockSpec(tuple(of_block), at_block)]
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if with_lse:
        out_specs.append(pl.BlockSpec((*of_block[:3], 1), at_block))
        out_shape.append(jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32))
    block = tiles.pages * page_size
    scratch = [
        pltpu.VMEM((tiles.heads, queries, _LANES), jnp.float32),
        pltpu.VMEM((tiles.heads, queries, _LANES), jnp.float32),
        pltpu.VMEM((tiles.heads, queries, head_dim), jnp.float32),
        pltpu.VMEM((2, tiles.heads, block, 2 * head_dim), kv_pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
    ]
    return pl.pallas_call(
        partial(_kernel, has_sinks=sinks is not None, with_lse=with_lse, tiles=tiles, **known),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Items._fields),
            grid=(num_kv_heads // tiles.heads, items.row.shape[0]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*items, *operands)


def decode_items(kv_lens, rows) -> Items:
    """Rows [0, rows) with one token each, at the end of their sequences."""
    at = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    one = jnp.ones_like(at)
    return Items(rows[None], at, at, 0 * one, one, kv_lens - 1)


def chunk_items(kv_lens, cu_q_lens, rows, queries: int, tokens: int) -> Items:
    """Rows [rows[0], rows[1]) in stretches of `queries` tokens of the batch."""
    of_rows = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    start, stop = cu_q_lens[:-1], cu_q_lens[1:]
    is_chunk = (of_rows >= rows[0]) & (of_rows < rows[1]) & (stop > start)
    low, high = start // queries, (stop - 1) // queries + 1
    counts = jnp.where(is_chunk, high - low, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    most = -(-tokens // queries) + min(kv_lens.shape[0], tokens // 2 + 1)
    at = jnp.arange(most, dtype=jnp.int32)
    row = jnp.sum(ends[None] <= at[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, kv_lens.shape[0] - 1)
    block = low[row] + at - (ends - counts)[row]
    from_token = jnp.maximum(start[row], block * queries)
    to_token = jnp.minimum(stop[row], (block + 1) * queries)
    position = kv_lens[row] - (stop[row] - from_token)
    return Items(
        ends[-1:], row, block, from_token - block * queries, to_token - block * queries, position
    )


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
    interpret: Any = False,
):
    tokens, num_heads, head_dim = q.shape
    rows = kv_lens.shape[0]
    num_kv_heads, page_size = kv_pages.shape[1:3]
    group = num_heads // num_kv_heads
    known = dict(scale=scale, window=window, soft_cap=soft_cap, with_lse=False, interpret=interpret)
    grouped = q.reshape(tokens, num_kv_heads, group, head_dim)
    per_row = min(rows, tokens)
    of_decode = Tiles(num_kv_heads, 1, max(1, 256 // page_size))
    decode_sinks = None if sinks is None else sinks.reshape(num_kv_heads, group, 1)
    decoded, *_ = _call(
        grouped[:per_row].transpose(1, 0, 2, 3),
        kv_pages,
        page_table,
        decode_items(kv_lens[:per_row], jnp.minimum(distribution[0], per_row)),
        decode_sinks,
        of_decode,
        1,
        **known,
    )
    decoded = decoded.transpose(1, 0, 2, 3).reshape(per_row, num_heads, head_dim)
    queries = min(64, tokens)
    spare = -tokens % queries
    of_chunk = Tiles(1, queries, max(1, 128 // page_size))
    items = chunk_items(kv_lens, cu_q_lens, distribution, queries, tokens)
    chunk_sinks = None
    if sinks is not None:
        chunk_sinks = jnp.repeat(sinks.reshape(num_kv_heads, group, 1), queries, axis=1)
    padded = jnp.pad(grouped, ((0, spare), (0, 0), (0, 0), (0, 0)))
    chunks, *_ = _call(
        padded.transpose(1, 2, 0, 3), kv_pages, page_table, items, chunk_sinks, of_chunk, 2, **known
    )
    chunks = chunks.transpose(2, 0, 1, 3)[:tokens].reshape(tokens, num_heads, head_dim)
    is_decoded = jnp.arange(tokens) < distribution[0]
    decoded = jnp.pad(decoded, ((0, tokens - per_row), (0, 0), (0, 0)))
    return jnp.where(is_decoded[:, None, None], decoded, chunks)
