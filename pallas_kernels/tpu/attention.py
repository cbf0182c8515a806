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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..items import Items, chunk_items, decode_items
from ..layout import KVLayout

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
_LANES = 128
_KV_BYTES = 4 << 20  # of the double buffer
_QUERY_BYTES = 6 << 20  # of queries and what is accumulated for them; 16 MiB are there unasked
_MOST_KEYS = 512  # of a block: more would bring little, and a sequence's last block is half empty


@dataclass(frozen=True, slots=True)
class Tiles:
    heads: int  # KV heads of one grid step
    queries: int  # tokens of one block
    pages: int  # of one block of keys and values

    @classmethod
    def for_rows(cls, layout: KVLayout, itemsize: int) -> Tiles:
        """For rows of one token: all heads of a page in one copy, if they fit."""
        heads = layout.num_kv_heads
        while (pages := _pages(layout, heads, itemsize)) == 0:
            heads //= 2 if heads % 2 == 0 else heads
        return cls(heads, 1, pages)

    @classmethod
    def for_chunks(cls, layout: KVLayout, itemsize: int, group: int, tokens: int) -> Tiles:
        """Head by head, with as many tokens as fit beside what is accumulated for them."""
        lanes = _rounded(layout.head_dim, _LANES)
        each = group * 4 * (4 * lanes + lanes + 2 * _LANES + 3 * _LANES)
        queries = 128
        while queries > 16 and queries * each > _QUERY_BYTES:
            queries //= 2
        queries = min(queries, _rounded(tokens, 16))
        return cls(1, queries, max(1, min(128 // layout.page_size, _pages(layout, 1, itemsize))))


def _pages(layout: KVLayout, heads: int, itemsize: int) -> int:
    """Of a block, so that two blocks fit; 0 where not even a page does."""
    row = heads * _rounded(2 * layout.head_dim, _LANES) * itemsize
    return min(_KV_BYTES // (2 * row), _MOST_KEYS) // layout.page_size


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


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
    sinks: Any  # VMEM f32 [heads, queries, 1] or None
    kv_scales: Any  # SMEM f32 [2, num_kv_heads] or None
    out: Any  # as q
    lse: Any  # VMEM [heads, a, b, 1] or None
    best: Any  # VMEM f32 [heads, queries, 128], all lanes alike
    total: Any
    sum: Any  # VMEM f32 [heads, queries, head_dim]
    buffer: Any  # VMEM [2, heads, pages * page_size, row]
    arrived: Any  # DMA semaphores [2]
    turn: Any  # SMEM [1]: blocks computed so far

    @property
    def block(self) -> int:
        return self.buffer.shape[2]

    @property
    def page_size(self) -> int:
        return self.block // self.tiles.pages

    def span(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The keys that an item sees: those of whole pages from the first on, and the end."""
        items, page_size = self.items, self.page_size
        position = items.position[item]
        end = position + items.end[item] - items.first[item]
        begin = jnp.int32(0)
        if self.window:
            begin = jnp.maximum(position - self.window + 1, 0) // page_size * page_size
        return begin, end

    def copies(self, table, group, at, span, slot, act) -> None:
        """`act` on the copy of each page of block `at` that holds keys of `span`."""
        tiles, page_size = self.tiles, self.page_size
        begin, end = span
        first = at * tiles.pages
        low = jnp.maximum(begin // page_size - first, 0)
        high = jnp.minimum((end + page_size - 1) // page_size - first, tiles.pages)

        def one(place: jax.Array, carry: None) -> None:
            heads = pl.ds(group * tiles.heads, tiles.heads)
            rows = pl.ds(pl.multiple_of(place * page_size, page_size), page_size)
            source = self.kv_pages.at[table[0, 0, first + place], heads]
            target = self.buffer.at[slot, :, rows]
            act(pltpu.make_async_copy(source, target, self.arrived.at[slot]))

        lax.fori_loop(low, high, one, None)

    def run(self) -> None:
        group, item = pl.program_id(0), pl.program_id(1)
        count, blocks = self.items.count[0], self.items.block
        span = begin, end = self.span(item)
        low, high = begin // self.block, (end + self.block - 1) // self.block

        @pl.when((group == 0) & (item == 0))
        def _() -> None:
            self.turn[0] = 0
            self.copies(self.table, group, low, span, 0, _start)

        @pl.when((item == 0) | (blocks[jnp.maximum(item - 1, 0)] != blocks[item]))
        def _() -> None:
            self.begin()

        lax.fori_loop(low, high, partial(self.step, group, item, high, span), None)

        @pl.when((item + 1 == count) | (blocks[jnp.minimum(item + 1, count - 1)] != blocks[item]))
        def _() -> None:
            self.finish(group)

    def begin(self) -> None:
        """A sink is a score without a value, there from the start."""
        if self.sinks is None:
            self.best[...] = jnp.full_like(self.best, _FAR)
            self.total[...] = jnp.zeros_like(self.total)
        else:
            self.best[...] = jnp.broadcast_to(self.sinks[...], self.best.shape)
            self.total[...] = jnp.ones_like(self.total)
        self.sum[...] = jnp.zeros_like(self.sum)

    def step(self, group, item, high, span, at, carry: None) -> None:
        """One block of keys: have the next one fetched, whoever's it is, and attend this one."""
        slot = lax.rem(self.turn[0], 2)
        self.turn[0] = self.turn[0] + 1

        @pl.when(at + 1 < high)
        def _() -> None:
            self.copies(self.table, group, at + 1, span, 1 - slot, _start)

        is_last = item + 1 == self.items.count[0]
        next_group = jnp.where(is_last, group + 1, group)

        @pl.when((at + 1 == high) & (next_group < pl.num_programs(0)))
        def _() -> None:
            following = self.span(jnp.where(is_last, 0, item + 1))
            first = following[0] // self.block
            self.copies(self.next_table, next_group, first, following, 1 - slot, _start)

        self.copies(self.table, group, at, span, slot, _wait)
        begin, end = span

        @pl.when((at * self.block < begin) | ((at + 1) * self.block > end))
        def _() -> None:
            # What lies outside is another's or garbage; 0 * nan is nan.
            key = at * self.block + lax.broadcasted_iota(jnp.int32, (1, self.block, 1), 1)
            block = self.buffer[slot]
            is_live = (key >= begin) & (key < end)
            self.buffer[slot] = jnp.where(is_live, block, jnp.zeros_like(block))

        seen = self.seen(item, at)
        for head in range(self.tiles.heads):
            self.attend(head, group, slot, seen)

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

    def attend(self, head: int, group, slot, seen: jax.Array) -> None:
        queries, head_dim = self.sum.shape[1:]
        q = self.q[head].reshape(queries, head_dim)
        kv = self.buffer[slot, head].astype(q.dtype)
        scale = self.scale
        if self.kv_scales is not None:
            scale *= self.kv_scales[0, group * self.tiles.heads + head]
        scores = scale * lax.dot_general(
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
            kv[:, head_dim : 2 * head_dim],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total = self.total[head][:, :1] * fade + jnp.sum(weights, 1, keepdims=True)
        self.sum[head] = self.sum[head] * fade + gained
        self.best[head] = jnp.broadcast_to(higher, self.best.shape[1:])
        self.total[head] = jnp.broadcast_to(total, self.total.shape[1:])

    def finish(self, group) -> None:
        total = self.total[:, :, :1]
        total = jnp.where(total == 0, 1.0, total)
        if self.lse is not None:
            lse = self.best[:, :, :1] + jnp.log(total)
            self.lse[...] = lse.reshape(self.lse.shape)
        for head in range(self.tiles.heads):
            out = self.sum[head] / total[head]
            if self.kv_scales is not None:
                out *= self.kv_scales[1, group * self.tiles.heads + head]
            self.out[head] = out.reshape(self.out.shape[1:]).astype(self.out.dtype)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()


def _kernel(*refs: Any, has_sinks: bool, has_scales: bool, with_lse: bool, **known: Any) -> None:
    given = iter(refs)
    items = Items(*(next(given) for _ in Items._fields))
    named = {name: next(given) for name in ("table", "next_table", "q", "kv_pages")}
    named["sinks"] = next(given) if has_sinks else None
    named["kv_scales"] = next(given) if has_scales else None
    named["out"] = next(given)
    named["lse"] = next(given) if with_lse else None
    scratch = ("best", "total", "sum", "buffer", "arrived", "turn")
    named |= dict(zip(scratch, given, strict=True))
    _Kernel(items=items, **named, **known).run()


@dataclass(frozen=True)
class _Call:
    """What both calls have in common."""

    kv_pages: jax.Array
    page_table: jax.Array
    kv_scales: jax.Array | None
    with_lse: bool
    interpret: Any
    rules: dict[str, Any]  # scale, window, soft_cap

    def __call__(
        self, q: jax.Array, sinks: jax.Array | None, items: Items, tiles: Tiles, axis: int
    ) -> list[jax.Array]:
        """q [num_kv_heads, a, b, head_dim], walked along `axis` in blocks of `tiles.queries`; sinks
        [num_kv_heads, a * b of a block, 1]. Returns as q, and the logarithms [..., 1]."""
        of_block = [tiles.heads, *q.shape[1:]]
        of_block[axis] = tiles.queries

        def at_block(group: Any, item: Any, *scalars: Any) -> tuple[Any, ...]:
            block = Items(*scalars).block[item]
            return (group, block, 0, 0) if axis == 1 else (group, 0, block, 0)

        out_specs = [pl.BlockSpec(tuple(of_block), at_block)]
        out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
        if self.with_lse:
            out_specs.append(pl.BlockSpec((*of_block[:3], 1), at_block))
            out_shape.append(jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32))
        queries, head_dim = of_block[1] * of_block[2], q.shape[3]
        specs, operands = self._rest(sinks, queries, tiles)
        kernel = partial(
            _kernel,
            has_sinks=sinks is not None,
            has_scales=self.kv_scales is not None,
            with_lse=self.with_lse,
            tiles=tiles,
            **self.rules,
        )
        block = tiles.pages * self.kv_pages.shape[2]
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(Items._fields),
                grid=(q.shape[0] // tiles.heads, items.count[0]),
                in_specs=[self._table(0), self._table(1), out_specs[0], *specs],
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((tiles.heads, queries, _LANES), jnp.float32),
                    pltpu.VMEM((tiles.heads, queries, _LANES), jnp.float32),
                    pltpu.VMEM((tiles.heads, queries, head_dim), jnp.float32),
                    pltpu.VMEM(
                        (2, tiles.heads, block, self.kv_pages.shape[3]), self.kv_pages.dtype
                    ),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((1,), jnp.int32),
                ],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
            interpret=self.interpret,
            name="ragged_paged_attention",
        )(*items, self.page_table[:, None], self.page_table[:, None], q, *operands)

    def _table(self, later: int) -> pl.BlockSpec:
        """The pages of an item's row, or of the item's after it: the first comes after the last."""

        def of_row(group: Any, item: Any, *scalars: Any) -> tuple[Any, ...]:
            items = Items(*scalars)
            at = item + later
            return items.row[jnp.where(at < items.count[0], at, 0)], 0, 0

        return pl.BlockSpec((1, 1, self.page_table.shape[1]), of_row, memory_space=pltpu.SMEM)

    def _rest(
        self, sinks: jax.Array | None, queries: int, tiles: Tiles
    ) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
        specs, operands = [pl.BlockSpec(memory_space=pl.ANY)], [self.kv_pages]
        if sinks is not None:
            specs.append(pl.BlockSpec((tiles.heads, queries, 1), lambda group, *_: (group, 0, 0)))
            operands.append(sinks)
        if self.kv_scales is not None:
            specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
            operands.append(self.kv_scales)
        return specs, operands


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
    interpret: Any = False,
) -> Any:
    """As `xla.ragged_paged_attention`. Pages of one byte an element must hold 32 tokens or more,
    those of two 16: a TPU's memory is tiled. `interpret` is pallas_call's."""
    tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = kv_pages.shape
    itemsize = kv_pages.dtype.itemsize
    if page_size % (32 // itemsize):
        raise ValueError(
            f"pages of {page_size} tokens of {kv_pages.dtype} do not fill a TPU's tiles"
        )
    layout = KVLayout(num_pages, num_kv_heads, page_size, head_dim)
    rules = {"scale": scale, "window": window, "soft_cap": soft_cap}
    call = _Call(kv_pages, page_table, kv_scales, with_lse, interpret, rules)
    group = num_heads // num_kv_heads
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, group, 1)
    grouped = q.reshape(tokens, num_kv_heads, group, head_dim)

    per_row = min(kv_lens.shape[0], tokens)
    items = decode_items(kv_lens[:per_row], jnp.minimum(distribution[0], per_row))
    of_rows = grouped[:per_row].transpose(1, 0, 2, 3)
    decoded = call(of_rows, sinks, items, Tiles.for_rows(layout, itemsize), 1)

    tiles = Tiles.for_chunks(layout, itemsize, group, tokens)
    items, _ = chunk_items(kv_lens, cu_q_lens, distribution, tiles.queries, tokens)
    spare = -tokens % tiles.queries
    of_chunks = jnp.pad(grouped.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, spare), (0, 0)))
    if sinks is not None:
        sinks = jnp.repeat(sinks, tiles.queries, axis=1)
    chunks = call(of_chunks, sinks, items, tiles, 2)

    is_decoded = (jnp.arange(tokens) < distribution[0])[:, None, None]
    merged = []
    for one, other in zip(decoded, chunks, strict=True):
        one = one.transpose(1, 0, 2, 3).reshape(per_row, num_heads, -1)
        other = other.transpose(2, 0, 1, 3)[:tokens].reshape(tokens, num_heads, -1)
        one = jnp.pad(one, ((0, tokens - per_row), (0, 0), (0, 0)))
        merged.append(jnp.where(is_decoded, one, other))
    return (merged[0], merged[1][..., 0]) if with_lse else merged[0]
