"""The kernel of ragged paged attention on a TPU, as one grid step runs it; see attention.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..items import Items
from ..layout import KVLayout

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises
LANES = 128
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
        lanes = _rounded(layout.head_dim, LANES)
        each = group * 4 * (4 * lanes + lanes + 2 * LANES + 3 * LANES)
        queries = 128
        while queries > 16 and queries * each > _QUERY_BYTES:
            queries //= 2
        queries = min(queries, _rounded(tokens, 16))
        return cls(1, queries, max(1, min(128 // layout.page_size, _pages(layout, 1, itemsize))))


def _pages(layout: KVLayout, heads: int, itemsize: int) -> int:
    """Of a block, so that two blocks fit; 0 where not even a page does."""
    row = heads * _rounded(2 * layout.head_dim, LANES) * itemsize
    return min(_KV_BYTES // (2 * row), _MOST_KEYS) // layout.page_size


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


@dataclass(frozen=True)
class Kernel:
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

    def copies(
        self,
        table: Any,
        group: Any,
        at: Any,
        span: tuple[Any, Any],
        slot: Any,
        act: Callable[[Any], None],
    ) -> None:
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
        count, blocks = self.items.real[0], self.items.block
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

    def step(
        self, group: Any, item: Any, high: Any, span: tuple[Any, Any], at: Any, carry: None
    ) -> None:
        """One block of keys: have the next one fetched, whoever's it is, and attend this one."""
        slot = lax.rem(self.turn[0], 2)
        self.turn[0] = self.turn[0] + 1

        @pl.when(at + 1 < high)
        def _() -> None:
            self.copies(self.table, group, at + 1, span, 1 - slot, _start)

        is_last = item + 1 == self.items.real[0]
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

    def seen(self, item: Any, at: Any) -> jax.Array:
        """[queries, block] bool: which query may see which key; none, if it is not the item's."""
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

    def attend(self, head: int, group: Any, slot: Any, seen: jax.Array) -> None:
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

    def finish(self, group: Any) -> None:
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


def run_kernel(*refs: Any, has_sinks: bool, has_scales: bool, with_lse: bool, **known: Any) -> None:
    given = iter(refs)
    items = Items(*(next(given) for _ in Items._fields))
    named = {name: next(given) for name in ("table", "next_table", "q", "kv_pages")}
    named["sinks"] = next(given) if has_sinks else None
    named["kv_scales"] = next(given) if has_scales else None
    named["out"] = next(given)
    named["lse"] = next(given) if with_lse else None
    scratch = ("best", "total", "sum", "buffer", "arrived", "turn")
    named |= dict(zip(scratch, given, strict=True))
    Kernel(items=items, **named, **known).run()
