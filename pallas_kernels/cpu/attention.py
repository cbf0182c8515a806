"""Attention over pages with all that a layer does between two products; see attention.cc."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .int8 import Norm


def fits(head_dim: int, kv_dtype: object) -> bool:
    return head_dim % 16 == 0 and kv_dtype == jnp.bfloat16


def paged_attention(
    qkv: jax.Array,
    kv_pages: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    scale: float,
    window: int = 0,
    turn: tuple[jax.Array, jax.Array] | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Norms and rotates queries and keys, stores keys and values, attends: what write_kv and
    ragged_paged_attention do for others.

    qkv     [tokens, num_heads + 2 num_kv_heads, head_dim] float32: queries, keys, values
    turn    cosines and sines [tokens, 1, head_dim / 2] float32
    The rest as in ragged_paged_attention; pages are bfloat16, head_dim a multiple of 16.
    Returns [tokens, num_heads * head_dim] float32, 0 for tokens of no row, and the pages.
    """
    tokens, heads, dim = qkv.shape
    nothing = jnp.zeros((0,), jnp.float32)
    cos, sin = turn or (nothing, nothing)
    num_heads = heads - 2 * kv_pages.shape[1]
    shapes = (
        jax.ShapeDtypeStruct((tokens, num_heads * dim), jnp.float32),  # type: ignore[no-untyped-call]
        jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),  # type: ignore[no-untyped-call]
    )
    call = jax.ffi.ffi_call("fastserve_attention", shapes, input_output_aliases={1: 1})
    mixed, kv_pages = call(
        qkv,
        kv_pages,
        kv_lens,
        page_table,
        cu_q_lens,
        distribution,
        cos,
        sin,
        q_norm.weight if q_norm else nothing,
        k_norm.weight if k_norm else nothing,
        scale=np.float32(scale),
        window=np.int32(window),
        eps=np.float32(q_norm.eps if q_norm else 0.0),
    )
    return mixed, kv_pages
