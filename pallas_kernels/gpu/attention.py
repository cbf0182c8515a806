"""Ragged paged attention on NVIDIA GPUs (Mosaic GPU), from Ampere on: one kernel for rows of one
token and for chunks.

A block of threads takes one item (a sequence and a block of its queries, see items.py), one group
of query heads that share a KV head, and one part of the sequence: rows of one token are split where
they are fewer than the chip has room for, and the parts merged by their logarithms. Pages come into
a double buffer, by TMA from Hopper on and by cp.async before. Products are mma.sync, which all of
these chips have: of a token's few rows by one warp's sixteen, with the warps side by side over the
keys, so that what is read from shared memory is read once. Hopper multiplies chunks by wgmma, which
reads keys and values where they lie. Every item writes a block of its own: none waits for another.

Softmax is accumulated block by block (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). Knows no model and no request.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..items import Items, chunk_items, decode_items
from .kernel import run_kernel
from .rules import WARPS, Rules

_MOST_HEADS = 8  # query heads of a block of threads
_BLOCKS_WANTED = 256  # of threads: two for each multiprocessor
_MOST_PARTS = 32


def _call(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    items: Items,
    sinks: jax.Array | None,
    kv_scales: jax.Array | None,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """q [heads, blocks, rows, head_dim] -> [heads, items, rows, head_dim], logarithms."""
    heads, count, row = q.shape[0], items.row.shape[0], kv_pages.shape[3]
    shape = (rules.parts, heads, count, rules.rows, rules.head_dim)
    kept = jnp.float32 if rules.parts > 1 else q.dtype
    is_narrow = kv_pages.dtype.itemsize == 1
    block = _shared((2, rules.keys, row), kv_pages.dtype, rules.head_dim)
    if is_narrow:
        block = plgpu.SMEM((2, rules.keys, row), kv_pages.dtype)
    width = rules.head_dim if rules.by_wgmma else rules.keys
    scratch = [block, _shared((rules.rows, width), rules.dtype, width)]
    if is_narrow:
        scratch.append(_shared((rules.keys, row), rules.dtype, rules.head_dim))
    if rules.has_tma:
        scratch.append(plgpu.Barrier(num_arrivals=rules.copies, num_barriers=2))

    def body(*refs: Any) -> None:
        has = {"has_sinks": sinks is not None, "has_scales": kv_scales is not None}
        run_kernel(*refs, rules=rules, is_narrow=is_narrow, **has)

    operands = [*items, page_table, q, kv_pages]
    operands += [x for x in (sinks, kv_scales) if x is not None]
    out, lse = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(shape, kept),
            jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        ],
        grid=(heads, count, rules.parts),
        grid_names=("head", "item", "part"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=rules.interpret,
        kernel_name="ragged_paged_attention",
    )(*operands)
    if rules.parts == 1:
        return out[0], lse[0]
    best = lse.max(axis=0)
    share = jnp.exp(lse - best)
    total = share.sum(axis=0)
    return jnp.sum(out * share[..., None], axis=0) / total[..., None], best + jnp.log(total)


def _shared(shape: tuple[int, ...], dtype: Any, together: int) -> Any:
    """Swizzled so that neither rows nor columns meet in a bank; `together` elements of a row are
    read as one operand."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if together * itemsize % s == 0)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


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
    has_tma: bool = True,
    has_wgmma: bool = False,
    interpret: Any = False,
) -> Any:
    """As `xla.ragged_paged_attention`, head_dim a multiple of 16, pages of 8 to 256. Queries are
    bfloat16 or float16: products of float32 there are none. `has_tma` is said of Hopper and later,
    `has_wgmma` of Hopper alone; `interpret`, under which any type will do, is plgpu.kernel's."""
    tokens, num_heads, head_dim = q.shape
    if head_dim % 16 or kv_pages.shape[2] not in (8, 16, 32, 64, 128, 256):
        raise ValueError(f"heads of {head_dim} in pages of {kv_pages.shape[2]} do not fill a tile")
    if not has_tma and kv_pages.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        raise ValueError("fp8 pages want a Hopper GPU or a later one")
    num_kv_heads, page_size = kv_pages.shape[1:3]
    group = num_heads // num_kv_heads
    own = next(heads for heads in range(min(group, _MOST_HEADS), 0, -1) if group % heads == 0)
    heads = num_heads // own
    by_head = q.reshape(tokens, heads, own, head_dim).transpose(1, 0, 2, 3)
    per_head = None if sinks is None else sinks.astype(jnp.float32).reshape(heads, own)

    def call(q: jax.Array, row_warps: int, together: int, items: Items, parts: int) -> Any:
        """q [heads, tokens, own, head_dim], so many tokens in a block."""
        known = (scale, window, soft_cap, page_size, head_dim, heads // num_kv_heads)
        by_wgmma = has_wgmma and row_warps == WARPS
        rules = Rules(*known, row_warps, own, parts, q.dtype, has_tma, by_wgmma, interpret)
        used = together * own  # of its rows
        spare = rules.rows - used
        blocks = jnp.pad(q, ((0, 0), (0, -q.shape[1] % together), (0, 0), (0, 0)))
        blocks = blocks.reshape(heads, -1, used, head_dim)
        blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, spare), (0, 0)))
        sinks = None
        if per_head is not None:
            sinks = jnp.pad(jnp.tile(per_head, (1, together)), ((0, 0), (0, spare)))
        out, lse = _call(blocks, kv_pages, page_table, items, sinks, kv_scales, rules)
        shape = (heads, -1, together, own)  # heads, items, tokens, their heads
        return out[:, :, :used].reshape(*shape, head_dim), lse[:, :, :used].reshape(shape)

    per_row = min(kv_lens.shape[0], tokens)
    parts = min(_MOST_PARTS, -(-_BLOCKS_WANTED // (heads * per_row)))
    items = decode_items(kv_lens[:per_row], jnp.minimum(distribution[0], per_row))
    few = 1 if head_dim % 32 == 0 else 2  # the other warps share a head's columns, by eights
    decoded = call(by_head[:, :per_row], few, 1, items, parts)

    # What a thread holds must find room; without TMA it holds addresses, too.
    many = WARPS if has_wgmma or head_dim <= (128 if has_tma else 64) else 2
    together = 16 * many // own
    items, item_of = chunk_items(kv_lens, cu_q_lens, distribution, together, tokens)
    chunks = call(by_head, many, together, items, 1)
    place = item_of, jnp.arange(tokens) % together
    pairs = zip(decoded, chunks, strict=True)
    out, lse = (_joined(one, chunk, distribution[0], place) for one, chunk in pairs)
    out = out.astype(q.dtype)
    return (out, lse) if with_lse else out


def _joined(one: jax.Array, chunk: jax.Array, ones: jax.Array, place: Any) -> jax.Array:
    """Of the first `ones` tokens what lies in `one` [heads, rows, 1, own, ...], of the others what
    has its place [tokens] in `chunk` [heads, items, together, own, ...]: [tokens, heads, ...]."""
    tokens, one = len(place[0]), one[:, :, 0]
    rest = ((0, 0), (0, tokens - one.shape[1]), *((0, 0),) * (one.ndim - 2))
    is_one = (jnp.arange(tokens) < ones).reshape(1, tokens, *(1,) * (one.ndim - 2))
    both = jnp.where(is_one, jnp.pad(one, rest), chunk[:, *place])
    heads, _, own, *shape = both.shape
    return jnp.swapaxes(both, 0, 1).reshape(tokens, heads * own, *shape)
