"""Each operation in plain jnp, one sequence at a time: slow, and obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


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
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same contract as `xla.ragged_paged_attention`, outside jit; tokens of no row give zeros."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = kv_pages.shape[1]
    out, lse = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:2], jnp.float32)
    key_scale, value_scale = jnp.ones((2, num_kv_heads)) if kv_scales is None else kv_scales
    per_kv_head = num_heads // num_kv_heads
    for row in range(int(distribution[1])):
        first, end = int(cu_q_lens[row]), int(cu_q_lens[row + 1])
        kv_len = int(kv_lens[row])
        own = kv_pages[page_table[row]].astype(jnp.float32)  # [pages, heads, page_size, 2 * dim]
        own = own[..., : 2 * head_dim].transpose(1, 0, 2, 3)
        flat = own.reshape(num_kv_heads, -1, 2, head_dim)[:, :kv_len]
        flat *= jnp.stack([key_scale, value_scale], axis=1)[:, None, :, None]
        keys, values = jnp.repeat(flat, per_kv_head, axis=0).transpose(2, 0, 1, 3)
        at = np.arange(kv_len - (end - first), kv_len)[:, None]
        past = np.arange(kv_len)[None]
        seen = (past <= at) & ((past > at - window) if window else True)
        scores = jnp.einsum("thd,hsd->hts", q[first:end].astype(jnp.float32), keys) * scale
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        if sinks is not None:  # one more key that all see, with a value of zeros
            sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
            values = jnp.pad(values, ((0, 0), (0, 1), (0, 0)))
        weights = jax.nn.softmax(scores, axis=-1)
        out = out.at[first:end].set(jnp.einsum("hts,hsd->thd", weights, values))
        lse = lse.at[first:end].set(jax.nn.logsumexp(scores, axis=-1).T)
    return (out.astype(q.dtype), lse) if with_lse else out.astype(q.dtype)


def gather_pages(kv_pages: list[jax.Array], sources: jax.Array) -> jax.Array:
    """Same contract as `page_copy.gather_pages`."""
    return jnp.stack(
        [jnp.stack([pages[page] for pages in kv_pages]) for page in np.asarray(sources)]
    )


def scatter_pages(
    kv_pages: list[jax.Array], staged: jax.Array, targets: jax.Array, real: int
) -> list[jax.Array]:
    """Same contract as `page_copy.scatter_pages`."""
    written = list(kv_pages)
    for i in range(real):
        for layer, pages in enumerate(written):
            written[layer] = pages.at[int(targets[i])].set(staged[i, layer])
    return written


def quant_matmul(
    x: jax.Array, weight: jax.Array, scales: jax.Array, x_scale: jax.Array | None = None
) -> jax.Array:
    """Same contract as `quant_matmul.quant_matmul`: the weights as they were, times x as it was."""
    wide = weight.astype(jnp.float32) * jnp.repeat(scales, weight.shape[1] // len(scales), axis=0).T
    was = x.astype(jnp.float32) * (1 if x_scale is None else x_scale)
    return jnp.einsum("ri,oi->ro", was, wide, precision="highest")


def moe_grouped_matmul(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Same contract as `moe.moe_grouped_matmul`; rows behind the last give zeros."""
    made, first = jnp.zeros((len(x), weight.shape[2]), jnp.float32), 0
    for expert, size in enumerate(np.asarray(group_sizes)):
        own = x[first : first + size].astype(jnp.float32)
        made = made.at[first : first + size].set(own @ weight[expert].astype(jnp.float32))
        first += int(size)
    return made
