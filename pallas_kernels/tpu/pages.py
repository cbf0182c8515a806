"""Copies of whole pages within a TPU's memory; see page_copy.py. A page of a layer is one copy, all
of them are on their way at once, and nothing passes through the vector unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def _each(count: Any, layers: int, copy: Callable[[Any, int], Any]) -> None:
    """Starts `copy(i, layer)` of all, then waits for all."""

    def run(act: Callable[[Any], None]) -> None:
        def of_page(i: jax.Array, _: None) -> None:
            for layer in range(layers):
                act(copy(i, layer))

        lax.fori_loop(0, count, of_page, None)

    run(lambda copying: copying.start())
    run(lambda copying: copying.wait())


def gather_pages(kv_pages: list[jax.Array], sources: jax.Array, interpret: Any = False) -> Any:
    layers, size = len(kv_pages), sources.shape[0]

    def kernel(sources: Any, *refs: Any) -> None:
        *pages, staged, arrived = refs
        _each(
            size,
            layers,
            lambda i, layer: pltpu.make_async_copy(
                pages[layer].at[sources[i]], staged.at[i, layer], arrived
            ),
        )

    shape = (size, layers, *kv_pages[0].shape[1:])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[_ANYWHERE] * layers,
            out_specs=_ANYWHERE,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(shape, kv_pages[0].dtype),
        interpret=interpret,
        name="gather_pages",
    )(sources, *kv_pages)


def scatter_pages(
    kv_pages: list[jax.Array],
    staged: jax.Array,
    targets: jax.Array,
    real: jax.Array,
    interpret: Any = False,
) -> Any:
    layers = len(kv_pages)

    def kernel(targets: Any, real: Any, staged: Any, *refs: Any) -> None:
        written, arrived = refs[layers:-1], refs[-1]
        _each(
            real[0],
            layers,
            lambda i, layer: pltpu.make_async_copy(
                staged.at[i, layer], written[layer].at[targets[i]], arrived
            ),
        )

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[_ANYWHERE] * (1 + layers),
            out_specs=[_ANYWHERE] * layers,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kv_pages],
        input_output_aliases={3 + layer: layer for layer in range(layers)},
        interpret=interpret,
        name="scatter_pages",
    )(targets, jnp.asarray(real).reshape(1), staged, *kv_pages)
