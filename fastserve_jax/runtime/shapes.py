"""Shapes without arrays, so that programs are compiled before there is anything to run them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike


@dataclass(frozen=True, slots=True)
class Program:
    """One to be compiled: a pure function, and the shapes of its arguments."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()  # the arguments that become results in place
    specs: tuple[Any, Any] | None = None  # of arguments and results on a mesh; see mesh.py
    placed: Any = None  # shardings of the results, where the memory of one is not the device's

    def lower(self) -> jax.stages.Lowered:
        """Traces it."""
        jitted = jax.jit(self.function, donate_argnums=self.donated, out_shardings=self.placed)
        return jitted.lower(*self.args)


def like(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None) -> Any:
    """Stands for an array wherever one is only traced, hence Any."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def ints(*shape: int) -> Any:
    return like(shape, jnp.int32)


def stacked[T](of_each: Sequence[T]) -> T:
    """Numpy trees, one for each replica, as a program of them all takes them."""
    if len(of_each) == 1:
        return of_each[0]
    joined: T = jax.tree.map(lambda *xs: np.stack(xs), *of_each)
    return joined


def abstract(x: jax.Array) -> Any:
    return like(x.shape, x.dtype)


def by_leaves(function: Callable[..., Any], params: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The leaves of `params` as shapes, and `function` of them: to flatten a state of hundreds of
    variables would cost each step 0.25 ms."""
    leaves, tree = jax.tree.flatten(jax.tree.map(abstract, params))

    def of_leaves(leaves: list[jax.Array], *given: Any, **named: Any) -> Any:
        return function(jax.tree.unflatten(tree, leaves), *given, **named)

    return leaves, of_leaves
