"""Which type each weight has. Knows parameters' names, no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` is that of norms, biases and KV pages, and of every matrix unless `int8`.

    An int8 matrix has a float32 scale per output beside it. `kept` names the matrices that stay in
    `dtype` all the same, without ".weight", where * stands for anything: "layers.*.mlp.down".
    """

    dtype: DTypeLike
    int8: bool = False
    kept: tuple[str, ...] = ()

    def of(self, matrix: str) -> DTypeLike:
        if self.int8 and not any(fnmatchcase(matrix, pattern) for pattern in self.kept):
            return jnp.int8
        return self.dtype
