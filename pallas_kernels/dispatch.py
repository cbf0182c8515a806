"""Which implementation attends on which platform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import xla
from .target import target


def implementation(q: jax.Array, kv_pages: jax.Array) -> str:
    """ "tpu" or "gpu" where that platform's kernel takes such arrays, otherwise "xla"."""
    page_size = kv_pages.shape[2]
    match target().platform:
        case "tpu":
            return "xla" if page_size % (32 // kv_pages.dtype.itemsize) else "tpu"
        case "gpu":
            fits = q.dtype.itemsize == 2 and q.shape[2] % 16 == 0
            fits &= page_size in (8, 16, 32, 64, 128, 256) and kv_pages.dtype.itemsize <= 2
            is_fp8 = kv_pages.dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
            return "gpu" if fits and (target().has_tma or not is_fp8) else "xla"
        case _:
            return "xla"


def prepare() -> None:
    """Before a program is compiled that was traced in another process. On a GPU jax says where the
    library lies that its kernels call, when their module is imported."""
    if target().platform == "gpu":
        from . import gpu  # noqa: F401


def ragged_paged_attention(
    q: jax.Array, kv_pages: jax.Array, *rows: jax.Array, by: str | None = None, **options: Any
) -> Any:
    """As `xla.ragged_paged_attention`, by the implementation that suits the platform, or `by`."""
    by = by or implementation(q, kv_pages)
    if by == "xla":
        return xla.ragged_paged_attention(q, kv_pages, *rows, **options)
    if by == "tpu":
        from . import tpu

        return tpu.ragged_paged_attention(q, kv_pages, *rows, **options)
    from . import gpu

    options |= {"has_tma": target().has_tma, "has_wgmma": target().has_wgmma}
    return gpu.ragged_paged_attention(q, kv_pages, *rows, **options)
