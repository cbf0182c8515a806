"""Less of a decoder: numbers that become zero, or heads and neurons that are gone.

    unstructured   a share of each matrix
    2:4            two of each four inputs of an output
    structured     MLP neurons, and KV heads with the query heads that read them: matrices become
                   smaller, and so does the model's configuration

What is left makes up for what goes, by least squares on text (second_order.py), unless it is asked
to stay. Zeros are kept as floats are: only structured pruning makes products smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig

from .second_order import smallest, sparse, without
from .seen import Seen, Text, Walk

UNSTRUCTURED, TWO_OF_FOUR, STRUCTURED = PATTERNS = ("unstructured", "2:4", "structured")
SECOND_ORDER, MAGNITUDE = METHODS = ("second-order", "magnitude")
_BLOCK = 64  # what is left of the neurons divides by it, if all did

type Arrays = dict[str, NDArray[Any]]
type Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Pruning:
    """`share` is what goes: of numbers, or of neurons; `heads` of KV heads, rounded down.
    `method` chooses numbers."""

    pattern: str
    share: float = 0.5
    heads: float = 0.0
    method: str = SECOND_ORDER

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.pattern not in PATTERNS:
            raise ConfigError(f"no pattern {self.pattern}: there are {', '.join(PATTERNS)}")
        if self.method not in METHODS:
            raise ConfigError(f"no method {self.method}: there are {', '.join(METHODS)}")
        for name in ("share", "heads"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is from 0 to less than 1, not {getattr(self, name)}")
        if self.pattern == TWO_OF_FOUR and self.share != 0.5:
            raise ConfigError("2:4 is a half: leave the share out")
        if self.pattern == UNSTRUCTURED and not self.share:
            raise ConfigError("of a share of 0 nothing goes")
        if self.pattern == STRUCTURED and self.method != SECOND_ORDER:
            raise ConfigError(f"{self.method} chooses numbers, and none in structured pruning")
        if self.heads and self.pattern != STRUCTURED:
            raise ConfigError(f"heads go in structured pruning, not in {self.pattern}")


def prune(
    config: ModelConfig,
    arrays: Mapping[str, NDArray[Any]],
    asked: Pruning,
    text: Text,
    progress: Progress = lambda *_: None,
) -> tuple[ModelConfig, Arrays]:
    """Embeddings, norms and experts stay as they are. Raises ConfigError."""
    now = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    made = _shrunk(config, asked) if asked.pattern == STRUCTURED else config
    before, after = Walk(config, text), Walk(made, text)
    x = before.begin(now)
    for layer in range(config.num_layers):
        seen = before.watch(layer, now, x)
        if asked.pattern == STRUCTURED:
            _remove_neurons(config, made, layer, now, seen)
            _remove_heads(config, made, layer, now, seen)
        else:
            for matrix, of in seen.items():
                now[f"{matrix}.weight"] = _thinned(now[f"{matrix}.weight"], of, asked)
        x = after.through(layer, now, x)
        progress(layer + 1, config.num_layers)
    return made, now


def _thinned(matrix: NDArray[Any], seen: Seen, asked: Pruning) -> NDArray[Any]:
    is_pattern = asked.pattern == TWO_OF_FOUR
    if is_pattern and matrix.shape[1] % 4:
        raise ConfigError(f"{matrix.shape[1]} inputs do not divide into fours")
    if asked.method == SECOND_ORDER:
        return sparse(matrix, seen.gram, asked.share, (2, 4) if is_pattern else None)
    if is_pattern:
        gone = smallest(np.abs(matrix).reshape(len(matrix), -1, 4), 2).reshape(matrix.shape)
    else:
        count = round(asked.share * matrix.size)
        gone = smallest(np.abs(matrix).reshape(-1), count).reshape(matrix.shape)
    return np.where(gone, 0, matrix)


def _shrunk(config: ModelConfig, asked: Pruning) -> ModelConfig:
    if config.num_experts and asked.share:
        raise ConfigError("experts have no neurons that are pruned: set the share to 0")
    inner, kv_heads = config.intermediate_size, config.num_kv_heads
    block = _BLOCK if inner % _BLOCK == 0 else 1
    neurons = max(block, -(-round(inner * (1 - asked.share)) // block) * block)
    groups = max(1, kv_heads - int(asked.heads * kv_heads))
    if (neurons, groups) == (inner, kv_heads):
        raise ConfigError(
            f"nothing would go: neurons do by {block} of {inner}, heads by 1 of {kv_heads}"
        )
    heads = groups * (config.num_heads // kv_heads)
    return replace(config, intermediate_size=neurons, num_kv_heads=groups, num_heads=heads)


def _remove_neurons(
    config: ModelConfig, made: ModelConfig, layer: int, now: Arrays, seen: Mapping[str, Seen]
) -> None:
    """Those go whose outputs, as large as they were on text, the matrix behind makes least of."""
    if made.intermediate_size == config.intermediate_size:
        return
    down = f"layers.{layer}.mlp.down"
    gram, matrix = seen[down].gram, now[f"{down}.weight"]
    matters = np.diag(gram) * (matrix**2).sum(0)
    kept = np.sort(np.argsort(-matters, kind="stable")[: made.intermediate_size])
    now[f"{down}.weight"] = without(matrix, gram, kept)
    rows = np.concatenate([kept, config.intermediate_size + kept]) if config.gated_mlp else kept
    _take(now, f"layers.{layer}.mlp.{'gate_up' if config.gated_mlp else 'up'}", rows)


def _remove_heads(
    config: ModelConfig, made: ModelConfig, layer: int, now: Arrays, seen: Mapping[str, Seen]
) -> None:
    """A KV head and all that read it, by the same measure."""
    if made.num_kv_heads == config.num_kv_heads:
        return
    out, groups, dim = f"layers.{layer}.attn.out", config.num_kv_heads, config.head_dim
    gram, matrix = seen[out].gram, now[f"{out}.weight"]
    matters = (np.diag(gram) * (matrix**2).sum(0)).reshape(groups, -1).sum(1)
    kept = np.sort(np.argsort(-matters, kind="stable")[: made.num_kv_heads])
    columns = np.arange(matrix.shape[1]).reshape(groups, -1)[kept].reshape(-1)
    now[f"{out}.weight"] = without(matrix, gram, columns)
    of_kv = np.arange(groups * dim).reshape(groups, dim)[kept].reshape(-1)
    keys, values = ((config.num_heads + at) * dim for at in (0, groups))
    _take(now, f"layers.{layer}.attn.qkv", np.concatenate([columns, keys + of_kv, values + of_kv]))


def _take(now: Arrays, matrix: str, rows: NDArray[np.int64]) -> None:
    for name in (f"{matrix}.weight", f"{matrix}.bias"):
        if name in now:
            now[name] = now[name][rows]


def zeros(arrays: Mapping[str, NDArray[Any]]) -> float:
    """Share of the layers' matrices that is zero."""
    matrices = [a for n, a in arrays.items() if n.startswith("layers.") and a.ndim > 1]
    return sum(int((a == 0).sum()) for a in matrices) / max(1, sum(a.size for a in matrices))
