"""Products with weights of fewer bits on a TPU; see quant_matmul.py for what they are.

The grid walks blocks of rows, of outputs, and of inputs innermost. Weights come into fast memory as
they are stored and are widened there; what is summed stays there until a block of outputs is done.
Blocks are as large as half of the memory that is there unasked allows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_ROWS, _OUTPUTS, _INPUTS = 256, 512, 2048  # of a block at the most: 8 MiB with two of each
_TILE = 32  # rows: what fills a tile of the narrowest type


def _kernel(
    x: Any, weight: Any, scales: Any, x_scale: Any, out: Any, sums: Any, *, group: int
) -> None:
    at, last = pl.program_id(2), pl.num_programs(2) - 1
    is_integer = x.dtype == jnp.int8

    @pl.when(at == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    stretch = min(group, x.shape[1])
    first = at * x.shape[1] // group
    for i in range(x.shape[1] // stretch):
        part = slice(i * stretch, (i + 1) * stretch)
        narrow = weight[:, part]
        made = lax.dot_general(
            x[:, part],
            narrow if is_integer else narrow.astype(x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if is_integer else jnp.float32,
        )
        sums[...] += made.astype(jnp.float32) * scales[pl.ds(first + i, 1), :]

    @pl.when(at == last)
    def _() -> None:
        out[...] = sums[...] * x_scale[...] if is_integer else sums[...]


def quant_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    x_scale: jax.Array | None,
    interpret: Any = False,
) -> Any:
    """As `pallas_kernels.quant_matmul`, of stretches that are multiples of 128."""
    rows, size = x.shape
    outputs, groups = len(weight), len(scales)
    group = size // groups
    if size % groups or group % 128:
        raise ValueError(f"{groups} stretches of {size} inputs are no multiples of 128")
    block_rows = min(_ROWS, -(-rows // _TILE) * _TILE)
    block_outputs = min(_OUTPUTS, -(-outputs // 128) * 128)
    block = _largest(size, group)
    x = jnp.pad(x, ((0, -rows % block_rows), (0, 0)))
    beside = jnp.zeros((rows, 1)) if x_scale is None else x_scale
    beside = jnp.pad(beside, ((0, -rows % block_rows), (0, 0)))
    made = pl.pallas_call(
        partial(_kernel, group=group),
        grid=(len(x) // block_rows, -(-outputs // block_outputs), size // block),
        in_specs=[
            pl.BlockSpec((block_rows, block), lambda r, o, i: (r, i)),
            pl.BlockSpec((block_outputs, block), lambda r, o, i: (o, i)),
            pl.BlockSpec((groups, block_outputs), lambda r, o, i: (0, o)),
            pl.BlockSpec((block_rows, 1), lambda r, o, i: (r, 0)),
        ],
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda r, o, i: (r, o)),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), jnp.float32),
        scratch_shapes=[pltpu.VMEM((block_rows, block_outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="quant_matmul",
    )(x, weight, scales, beside)
    return made[:rows]


def _largest(size: int, group: int) -> int:
    """Inputs of a block: whole stretches, or an even part of one, that divide all of them."""
    units = size // 128
    fitting = [n for n in range(1, _INPUTS // 128 + 1) if units % n == 0]
    whole = [n for n in fitting if n * 128 % group == 0 or group % (n * 128) == 0]
    return 128 * max(whole)
