"""Which type each weight has. Knows parameters' names, no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jax.typing import DTypeLike

INT8, W8A8, INT4, FP8 = "int8", "w8a8", "int4", "fp8"
KINDS = {INT8: jnp.int8, W8A8: jnp.int8, INT4: jnp.int4, FP8: jnp.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Stored:
    """How a matrix [out, in] is kept in fewer bits.

    `kind` is of KINDS. w8a8 is multiplied with activations of eight bits: its input is spread
    (spread.py) and it has a scale for each output. The others are widened where they are used:
    they have a scale for each output and each stretch of `group` inputs; 0: for all of them.
    """

    kind: str
    group: int = 0

    @property
    def dtype(self) -> DTypeLike:
        return KINDS[self.kind]

    def groups(self, size: int) -> int:
        """Of so many inputs."""
        return size // self.group if self.group else 1


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` is that of norms, biases and KV pages, and of every matrix unless `int8`.

    An int8 matrix has a float32 scale per output beside it. `kept` names the matrices that stay in
    `dtype` all the same, without ".weight", where * stands for anything: "layers.*.mlp.down".
    `stored` are the matrices of a model that was quantised before, by their whole names.
    """

    dtype: DTypeLike
    int8: bool = False
    kept: tuple[str, ...] = ()
    stored: tuple[tuple[str, Stored], ...] = ()

    def of(self, matrix: str) -> DTypeLike | Stored:
        """int8: with activations of eight bits, too."""
        for name, stored in self.stored:
            if name == matrix:
                return jnp.int8 if stored.kind == W8A8 else stored
        if self.int8 and not any(fnmatchcase(matrix, pattern) for pattern in self.kept):
            return jnp.int8
        return self.dtype
