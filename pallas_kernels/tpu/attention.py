"""Ragged paged attention on a TPU (Mosaic): one kernel for rows of one token and for chunks.

The grid walks groups of KV heads, and in each of them items: a sequence and the block of its
queries that is attended at once. Of a row with one token that block is its query heads; of a chunk
it is a stretch of the batch's tokens, wherever rows begin, and each row with tokens in it is an
item of its own. Pages are copied one by one into a double buffer, only those that an item can see;
the first of an item are on their way while the one before it is computed. Tiles are as large as the
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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..items import Items, chunk_items, decode_items
from ..layout import KVLayout
from .kernel import LANES, Tiles, run_kernel


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
            run_kernel,
            has_sinks=sinks is not None,
            has_scales=self.kv_scales is not None,
            with_lse=self.with_lse,
            tiles=tiles,
            **self.rules,
        )
        block, row = tiles.pages * self.kv_pages.shape[2], self.kv_pages.shape[3]
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(Items._fields),
                grid=(q.shape[0] // tiles.heads, items.real[0]),
                in_specs=[self._table(0), self._table(1), out_specs[0], *specs],
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((tiles.heads, queries, LANES), jnp.float32),
                    pltpu.VMEM((tiles.heads, queries, LANES), jnp.float32),
                    pltpu.VMEM((tiles.heads, queries, head_dim), jnp.float32),
                    pltpu.VMEM((2, tiles.heads, block, row), self.kv_pages.dtype),
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
            return items.row[jnp.where(at < items.real[0], at, 0)], 0, 0

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
