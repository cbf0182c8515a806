"""Shapes without arrays, so that programs are compiled before there is anything to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

type Lower = Callable[[], jax.stages.Lowered]  # traces one program


def like(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None) -> Any:
    """Stands for an array wherever one is only traced, hence Any."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def ints(*shape: int) -> Any:
    return like(shape, jnp.int32)


def abstract(x: jax.Array) -> Any:
    return like(x.shape, x.dtype)
