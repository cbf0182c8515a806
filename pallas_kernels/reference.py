"""Each operation in plain numpy, one sequence at a time: slow, and obviously right."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

type Floats = NDArray[np.float32]


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
) -> Floats | tuple[Floats, Floats]:
    """Same contract as `xla.ragged_paged_attention`, in float32; tokens of no row give zeros."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = kv_pages.shape[1]
    pages, table = np.asarray(kv_pages), np.asarray(page_table)
    asked, starts = _wide(q).swapaxes(0, 1), np.asarray(cu_q_lens)
    out, lse = np.zeros(asked.shape, np.float32), np.zeros(asked.shape[:2], np.float32)
    scales = np.ones((2, num_kv_heads), np.float32) if kv_scales is None else _wide(kv_scales)
    for row in range(int(distribution[1])):
        first, end, kv_len = int(starts[row]), int(starts[row + 1]), int(kv_lens[row])
        own = _wide(pages[table[row]])  # [pages, heads, page_size, 2 * dim]
        own = own[..., : 2 * head_dim].swapaxes(0, 1)
        flat = own.reshape(num_kv_heads, -1, 2, head_dim)[:, :kv_len]
        flat = np.repeat(flat * scales.T[:, None, :, None], num_heads // num_kv_heads, axis=0)
        keys, values = flat[:, :, 0], flat[:, :, 1]
        at = np.arange(kv_len - (end - first), kv_len)[:, None]
        past = np.arange(kv_len)[None]
        seen = (past <= at) & ((past > at - window) if window else True)
        scores = asked[:, first:end] @ keys.swapaxes(1, 2) * np.float32(scale)
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(seen, scores, -np.inf)
        if sinks is not None:  # one more key that all see, with a value of zeros
            sink = np.broadcast_to(_wide(sinks)[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, sink], axis=-1)
            values = np.pad(values, ((0, 0), (0, 1), (0, 0)))
        most = scores.max(-1, keepdims=True)
        weights = np.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        out[:, first:end] = weights @ values / total
        lse[:, first:end] = (np.log(total) + most)[..., 0]
    attended = out.swapaxes(0, 1).astype(q.dtype)
    return (attended, lse.T) if with_lse else attended


def gather_pages(kv_pages: Sequence[ArrayLike], sources: jax.Array) -> NDArray[np.generic]:
    """Same contract as `page_copy.gather_pages`."""
    return np.stack([np.asarray(pages)[np.asarray(sources)] for pages in kv_pages], axis=1)


def scatter_pages(
    kv_pages: Sequence[ArrayLike], staged: jax.Array, targets: jax.Array, real: int
) -> list[NDArray[np.generic]]:
    """Same contract as `page_copy.scatter_pages`."""
    written = [np.array(pages) for pages in kv_pages]
    for i in range(real):
        for layer, pages in enumerate(written):
            pages[int(targets[i])] = np.asarray(staged)[i, layer]
    return written


def quant_matmul(
    x: jax.Array, weight: jax.Array, scales: jax.Array, x_scale: jax.Array | None = None
) -> Floats:
    """Same contract as `quant_matmul.quant_matmul`: the weights as they were, times x as it was."""
    wide = _wide(weight) * np.repeat(_wide(scales), weight.shape[1] // len(scales), axis=0).T
    return _wide(x) * (1 if x_scale is None else _wide(x_scale)) @ wide.T


def moe_grouped_matmul(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> Floats:
    """Same contract as `moe.moe_grouped_matmul`; rows behind the last give zeros."""
    made, first = np.zeros((len(x), weight.shape[2]), np.float32), 0
    for expert, size in enumerate(np.asarray(group_sizes)):
        own = _wide(x[first : first + size])
        made[first : first + size] = own @ _wide(weight[expert])
        first += int(size)
    return made


def _wide(x: ArrayLike) -> Floats:
    return np.asarray(x).astype(np.float32)
