"""New keys and values into their pages on a TPU, in place.

A TPU's memory is tiled, and a token's row is a part of a tile: so tiles are read, changed and
written back, those of several stretches on their way at once. A stretch is what consecutive tokens
put into one tile. XLA's own scatter does the same for few tokens; of 1,024 at once, and of several
scatters one after the other, it makes copies of all pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TOGETHER = 8  # stretches
_SUBLANES = 8  # of float32
_MOST_TOKENS = 2048  # of a call: a head's rows are in fast memory


class Stretches(NamedTuple):
    """[tokens] int32 each but for the first, those that are real in front."""

    real: jax.Array  # [1]
    first: jax.Array  # token
    tokens: jax.Array  # how many
    page: jax.Array
    offset: jax.Array  # of the first token in its page


def stretches(pages: jax.Array, offsets: jax.Array, num_pages: int, tile: int) -> Stretches:
    """Of tokens that go to (page, offset); one whose page is out of range goes nowhere."""
    tokens = len(pages)
    at = jnp.arange(tokens, dtype=jnp.int32)
    follows = (pages == jnp.roll(pages, 1)) & (offsets == jnp.roll(offsets, 1) + 1)
    begins = (at == 0) | ~follows | (offsets % tile == 0)
    after = lax.cummin(jnp.where(begins, at, tokens), reverse=True)
    after = jnp.append(after[1:], jnp.int32(tokens))  # where the next one begins
    is_first = begins & (pages >= 0) & (pages < num_pages)
    first = jnp.sort(jnp.where(is_first, at, tokens))
    known = jnp.minimum(first, tokens - 1)
    real = jnp.sum(is_first, dtype=jnp.int32)[None]
    return Stretches(real, first, after[known] - known, pages[known], offsets[known])


@dataclass(frozen=True)
class _Kernel:
    """The refs of one KV head."""

    stretches: Stretches
    rows: Any  # VMEM f32 [1, tile + tokens + tile, row]: tokens behind a tile of nothing
    kv_pages: Any  # HBM
    tiles: Any  # VMEM [2, stretches together, tile, row]
    read: Any  # DMA semaphores [2]
    written: Any

    @property
    def tile(self) -> int:
        size: int = self.tiles.shape[2]
        return size

    def run(self) -> None:
        real = self.stretches.real[0]
        turns = lax.div(real + _TOGETHER - 1, jnp.int32(_TOGETHER))
        head = pl.program_id(0)

        def copies(turn: Any, slot: Any, act: Any, back: bool) -> None:
            for place in range(_TOGETHER):
                at = turn * _TOGETHER + place

                @pl.when((turn >= 0) & (at < real))
                def _(at: Any = at, place: int = place) -> None:
                    act(self.copy(head, at, slot, place, back))

        copies(jnp.int32(0), 0, lambda copy: copy.start(), back=False)

        def step(turn: jax.Array, _: None) -> None:
            slot = lax.rem(turn, 2)
            copies(turn - 1, 1 - slot, lambda copy: copy.wait(), back=True)
            copies(turn + 1, 1 - slot, lambda copy: copy.start(), back=False)
            copies(turn, slot, lambda copy: copy.wait(), back=False)
            for place in range(_TOGETHER):
                self.change(jnp.minimum(turn * _TOGETHER + place, real - 1), slot, place)
            copies(turn, slot, lambda copy: copy.start(), back=True)

        lax.fori_loop(0, turns, step, None)
        copies(turns - 1, lax.rem(turns + 1, 2), lambda copy: copy.wait(), back=True)

    def copy(self, head: Any, at: Any, slot: Any, place: int, back: bool) -> Any:
        offset = self.stretches.offset[at]
        begin = pl.multiple_of(offset - lax.rem(offset, self.tile), self.tile)
        there = self.kv_pages.at[self.stretches.page[at], head, pl.ds(begin, self.tile)]
        here = self.tiles.at[slot, place]
        if back:
            return pltpu.make_async_copy(here, there, self.written.at[slot])
        return pltpu.make_async_copy(there, here, self.read.at[slot])

    def change(self, at: Any, slot: Any, place: int) -> None:
        """The rows of stretch `at` in its tile. Rows are read from a multiple of eight on, and
        turned to where they belong."""
        tile, stretches = self.tile, self.stretches
        begin = lax.rem(stretches.offset[at], tile)
        wanted = stretches.first[at] - begin + tile
        shift = lax.rem(wanted, _SUBLANES)
        window = tile + _SUBLANES
        rows = self.rows[0, pl.ds(pl.multiple_of(wanted - shift, _SUBLANES), window), :]
        rows = pltpu.roll(rows, window - shift, axis=0)[:tile]
        place_in_tile = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        is_new = (place_in_tile >= begin) & (place_in_tile < begin + stretches.tokens[at])
        old = self.tiles[slot, place].astype(jnp.float32)
        self.tiles[slot, place] = _narrowed(jnp.where(is_new, rows, old), self.tiles.dtype)


def _narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    x = x.astype(jnp.int32) if jnp.issubdtype(dtype, jnp.integer) else x
    return x.astype(dtype)


def write_rows(
    kv_pages: jax.Array,
    rows: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    interpret: Any = False,
) -> Any:
    """rows [tokens, num_kv_heads, row], of the pages' type in value, to (page, offset) each; pages
    as in KVLayout, of whole tiles. No two stretches may share a tile: sequences own their pages."""
    if len(rows) > _MOST_TOKENS:
        for first in range(0, len(rows), _MOST_TOKENS):
            some = slice(first, first + _MOST_TOKENS)
            given = (rows[some], pages[some], offsets[some], interpret)
            kv_pages = write_rows(kv_pages, *given)
        return kv_pages
    num_pages, num_kv_heads, _, row = kv_pages.shape
    tile = 32 // kv_pages.dtype.itemsize
    found = stretches(pages, offsets, num_pages, tile)
    by_head = rows.astype(jnp.float32).transpose(1, 0, 2)
    spare = (tile, tile + _SUBLANES + -len(rows) % _SUBLANES)
    by_head = jnp.pad(by_head, ((0, 0), spare, (0, 0)))

    def kernel(*refs: Any) -> None:
        scalars, (mine, _, written, *rest) = refs[: len(found)], refs[len(found) :]
        _Kernel(Stretches(*scalars), mine, written, *rest).run()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(found),
            grid=(num_kv_heads,),
            in_specs=[
                pl.BlockSpec((1, *by_head.shape[1:]), lambda head, *_: (head, 0, 0)),
                anywhere,
            ],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((2, _TOGETHER, tile, row), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={len(found) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_kv",
    )(*found, by_head, kv_pages)
