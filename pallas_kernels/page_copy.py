"""Whole pages of all layers, into one contiguous array and back: what the host tier moves.

By plain XLA where a gather runs at the memory's rate already; by copies of whole pages on a TPU,
where it is a loop over rows. Knows page numbers only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .target import target


def gather_pages(kv_pages: list[jax.Array], sources: jax.Array, by: str | None = None) -> jax.Array:
    """Pages `sources` [n] int32 of each layer: [n, layers, num_kv_heads, page_size, row]."""
    if (by or _implementation(kv_pages)) == "tpu":
        from . import tpu

        staged: jax.Array = tpu.gather_pages(kv_pages, sources)
        return staged
    size = len(sources)
    layers = [pages.at[sources].get(mode="clip").reshape(size, -1) for pages in kv_pages]
    return jnp.stack(layers, axis=1).reshape(size, len(kv_pages), *kv_pages[0].shape[1:])


def scatter_pages(
    kv_pages: list[jax.Array],
    staged: jax.Array,
    targets: jax.Array,
    real: jax.Array,
    by: str | None = None,
) -> list[jax.Array]:
    """The first `real` pages of `staged`, as `gather_pages` makes it, to `targets` [n] int32; the
    other targets name the last of them once more. In place where `kv_pages` are donated."""
    if (by or _implementation(kv_pages)) == "tpu":
        from . import tpu

        written: list[jax.Array] = tpu.scatter_pages(kv_pages, staged, targets, real)
        return written
    return [
        pages.at[targets].set(staged[:, layer], mode="drop") for layer, pages in enumerate(kv_pages)
    ]


def _implementation(kv_pages: list[jax.Array]) -> str:
    fills = kv_pages[0].shape[2] % (32 // kv_pages[0].dtype.itemsize) == 0
    return "tpu" if target().platform == "tpu" and fills else "xla"
