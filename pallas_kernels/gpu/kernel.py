"""The kernel of ragged paged attention on a GPU, as a block of threads runs it: see attention.py"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..items import Items
from .rules import Rules

_FAR = -1e30  # a score below any real one; finite, so that no inf - inf arises


@dataclass(frozen=True)
class _Kernel:
    """The refs of one block of threads."""

    rules: Rules
    items: Items
    table: Any  # [rows, pages_per_row]
    q: Any  # [heads, blocks, rows, head_dim]
    kv_pages: Any  # as in KVLayout
    sinks: Any  # [heads, rows] float32 or None
    kv_scales: Any  # [2, num_kv_heads] float32 or None
    out: Any  # [parts, heads, items, rows, head_dim]
    lse: Any  # [parts, heads, items, rows]
    buffer: Any  # shared memory [2, keys, row of a page]
    operand: Any  # shared memory: queries [rows, head_dim] for wgmma, else weights [rows, keys]
    wide: Any  # shared memory [keys, row of a page], where pages are of a narrower type, or None
    arrived: Any  # barriers [2], with TMA

    def run(self) -> None:
        rules, items = self.rules, self.items
        head, item, part = (lax.axis_index(name) for name in ("head", "item", "part"))
        kv_head = lax.div(head, jnp.int32(rules.kv_heads_each))
        position, first, stop = items.position[item], items.first[item], items.end[item]
        begin, end = self.span(item)
        low, high = self.blocks(begin, end, part)
        row = items.row[item]

        def fetch(at: jax.Array, slot: jax.Array) -> None:
            self.fetch(row, kv_head, (begin, end), at, slot)

        @pl.when(low < high)
        def _() -> None:
            fetch(low, jnp.int32(0))

        queries = rules.load(self.q.at[head, items.block[item]], "LHS")
        if rules.by_wgmma:
            plgpu.store(self.operand, queries, optimized=False)
            plgpu.commit_smem()
            queries = self.operand
        scale = rules.scale * (1.0 if self.kv_scales is None else self.kv_scales[0, kv_head])

        def step(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(at - low, jnp.int32(2))
            if rules.has_tma:
                plgpu.commit_smem()  # what was read there comes before what TMA writes
            pl.when(at + 1 < high)(lambda: fetch(at + 1, 1 - slot))
            self.wait(slot, at + 1 < high)
            seen = self.seen(at, position - first, first, stop)
            live = begin - at * rules.keys, end - at * rules.keys
            return self.attend(queries, scale, slot, seen, live, carry)

        start = (*self.begin(head, part), rules.full((rules.rows, rules.head_dim), 0.0))
        best, total, mixed = lax.fori_loop(low, high, step, start)
        total = jnp.where(total == 0.0, 1.0, total)
        mixed = mixed / rules.spread(total, mixed.shape)
        if self.kv_scales is not None:
            mixed = mixed * self.kv_scales[1, kv_head]
        out, lse = (ref.at[part, head, item] for ref in (self.out, self.lse))
        plgpu.store(out, mixed.astype(out.dtype), optimized=False)
        plgpu.store(lse, best + jnp.log(total), optimized=False)

    def span(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of keys, from and to: those that any of its queries sees."""
        items, rules = self.items, self.rules
        end = items.position[item] + items.end[item] - items.first[item]
        if not rules.window:
            return jnp.int32(0), end
        return jnp.maximum(items.position[item] - rules.window + 1, 0), end

    def blocks(
        self, begin: jax.Array, end: jax.Array, part: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of keys, those that this part of the sequence has, from and to."""
        rules, keys = self.rules, jnp.int32(self.rules.keys)
        low, high = lax.div(begin, keys), lax.div(end + keys - 1, keys)
        if rules.parts > 1:
            each = lax.div(high - low + rules.parts - 1, jnp.int32(rules.parts))
            low = low + part * each
            high = jnp.minimum(high, low + each)
        return low, high

    def fetch(self, row: Any, kv_head: Any, span: tuple[Any, Any], at: Any, slot: Any) -> None:
        """Outside of the keys that are seen a page beside comes once more, from the chip's cache: a
        barrier counts on every copy."""
        rules, page_size = self.rules, jnp.int32(self.rules.page_size)
        begin, last = lax.div(span[0], page_size), lax.div(span[1] - 1, page_size)
        size = min(rules.page_size, rules.keys)
        for place in range(rules.copies):
            key = at * rules.keys + place * size
            page = self.table[row, jnp.clip(lax.div(key, page_size), begin, last)]
            source = self.kv_pages.at[page, kv_head]
            if size < rules.page_size:
                source = source.at[pl.ds(pl.multiple_of(lax.rem(key, page_size), size), size)]
            target = self.buffer.at[slot, pl.ds(place * size, size)]
            if rules.has_tma:
                plgpu.copy_gmem_to_smem(source, target, self.arrived.at[slot])
            else:
                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                plgpu.copy_gmem_to_smem(source, target, oob_mode=in_bounds)

    def wait(self, slot: jax.Array, has_next: jax.Array) -> None:
        if self.rules.has_tma:
            plgpu.barrier_wait(self.arrived.at[slot])
            return
        # Copies are waited for by how many later ones may still be on their way.
        pl.when(has_next)(lambda: plgpu.wait_gmem_to_smem(self.rules.copies))
        pl.when(jnp.logical_not(has_next))(lambda: plgpu.wait_gmem_to_smem(0))

    def begin(self, head: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Best score and sum so far. A sink is a score without a value, of the first part."""
        rules = self.rules
        best, total = rules.full((rules.rows,), _FAR), rules.full((rules.rows,), 0.0)
        if self.sinks is not None:
            layout = rules.layout("ACC").reduce(1)
            sink = plgpu.load(self.sinks.at[head], layout=layout, optimized=False)
            is_first = (part == 0).astype(jnp.float32)
            best = sink * is_first + best * (1.0 - is_first)
            total = total + is_first
        return best, total

    def seen(self, at: Any, begin: Any, first: Any, stop: Any) -> jax.Array:
        """[rows, keys] bool: which query may see which key; none, where it is not the item's. The
        block's first token would be at position `begin`."""
        rules = self.rules
        layout, shape = rules.layout("ACC"), (rules.rows, rules.keys)
        past = at * rules.keys + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        if rules.own > 1:  # divided by it: a shorter way, and exact for so few rows
            token = lax.shift_right_logical(
                token * -(-(1 << 16) // rules.own), jnp.full_like(token, 16)
            )
        position = begin + token
        seen = (past <= position) & (token >= first) & (token < stop)
        if rules.window:
            seen &= past > position - rules.window
        return seen

    def attend(
        self,
        queries: Any,
        scale: Any,
        slot: Any,
        seen: jax.Array,
        live: tuple[Any, Any],
        carry: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        """One block of keys, of which those from live[0] to live[1] are there to be seen."""
        rules, (best, total, mixed) = self.rules, carry
        dim, block = rules.head_dim, self.buffer.at[slot]
        halves = [pl.ds(first, dim) for first in (0, dim)]
        if self.wide is not None:
            for half in halves:
                narrow = plgpu.load(block.at[:, half], layout=rules.each_once(), optimized=False)
                narrow = narrow.astype(jnp.float32)  # fp8 has no shorter way to bf16
                widened = self.wide.at[:, half]
                plgpu.store(widened, narrow.astype(rules.dtype), optimized=False)
            block = self.wide
            if rules.by_wgmma:
                plgpu.commit_smem()
        keys, values = (block.at[:, half] for half in halves)
        if rules.by_wgmma:
            scores = rules.wgmma(queries, keys.T) * scale
        else:
            scores = rules.product(queries, rules.load(keys.T, "RHS")) * scale
        if rules.soft_cap:
            scores = rules.soft_cap * jnp.tanh(scores * (1.0 / rules.soft_cap))
        scores = jnp.where(seen, scores, _FAR)
        higher = jnp.maximum(best, scores.max(axis=1))
        wide = rules.spread(higher, scores.shape)
        # Masked explicitly: where nothing is seen yet, exp(_FAR - _FAR) would be 1.
        weights = jnp.where(seen, jnp.exp(scores - wide), 0.0)
        fade = jnp.exp(best - higher)
        mixed = mixed * rules.spread(fade, mixed.shape)
        total = total * fade + weights.sum(axis=1)
        return higher, total, self.mix(mixed, weights.astype(rules.dtype), values, live)

    def mix(
        self, mixed: jax.Array, weights: jax.Array, values: Any, live: tuple[Any, Any]
    ) -> jax.Array:
        """`mixed` and `values` [keys, head_dim], in shared memory, by their weights [rows, keys].
        What lies outside of `live` is another's or garbage; 0 * nan is nan."""
        rules = self.rules
        if rules.by_wgmma:
            pl.when((live[0] > 0) | (live[1] < rules.keys))(lambda: self.clear(values, live))
            return rules.wgmma(weights, values, mixed)
        self.operand[...] = weights
        held = rules.load(values, "RHS")
        key = rules.row_of(held.shape)
        held = jnp.where((key >= live[0]) & (key < live[1]), held, jnp.zeros_like(held))
        return mixed + rules.product(rules.load(self.operand, "LHS"), held)

    def clear(self, values: Any, live: tuple[Any, Any]) -> None:
        """Zeros where it lies."""
        layout = self.rules.each_once("ACC")
        held = plgpu.load(values, layout=layout, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=layout)
        held = jnp.where((key >= live[0]) & (key < live[1]), held, jnp.zeros_like(held))
        plgpu.store(values, held, optimized=False)
        plgpu.commit_smem()


def run_kernel(
    *refs: Any, rules: Rules, has_sinks: bool, has_scales: bool, is_narrow: bool
) -> None:
    given = iter(refs)
    items = Items(*(next(given) for _ in Items._fields))
    named = {name: next(given) for name in ("table", "q", "kv_pages")}
    named["sinks"] = next(given) if has_sinks else None
    named["kv_scales"] = next(given) if has_scales else None
    named |= {name: next(given) for name in ("out", "lse", "buffer", "operand")}
    named["wide"] = next(given) if is_narrow else None
    kernel = _Kernel(rules=rules, items=items, arrived=next(given, None), **named)
    pl.when(lax.axis_index("item") < items.real[0])(kernel.run)
