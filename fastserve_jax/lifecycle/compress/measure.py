"""What a model is before and after: bytes, perplexity by the arrays that serve, tokens a second.

Perplexity is of the model as it is stored and read back, its activations as it is served. Speed is
a server's, without a network: both models decode the same prompt by turns, in this process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import NDArray

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.config import load_settings
from fastserve_jax.core.types import Request, Sampling, TokenEvent
from fastserve_jax.errors import ConfigError
from fastserve_jax.fitting import precision_of
from fastserve_jax.models.decoder import State, abstract
from fastserve_jax.models.whole import logits_of
from fastserve_jax.reading import read
from fastserve_jax.weights.load import ModelFiles

from ..losses import behind, cross_entropy

type Progress = Callable[[int, int], None]

_PROMPT, _MOST_TOKENS = 16, 64


@dataclass(frozen=True, slots=True)
class Measured:
    file_bytes: int
    weight_bytes: int  # of the arrays that serve
    perplexity: float


def perplexity(
    files: ModelFiles,
    dtype: str,
    rows: Mapping[str, NDArray[Any]],
    cache_dir: Path,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Of rows as packing.py has them. `dtype` is the setting: auto is what is served. Raises
    ConfigError where nothing of them is to be learned."""
    settings = load_settings(overrides=[f"model.dtype={dtype}"])
    precision = precision_of(settings.model, files)
    graph, empty = abstract(files.config, precision)
    state = read(files, precision, empty, None, cache_dir / "converted", lambda *_: None)

    @jax.jit
    def told(state: State, tokens: Any, segments: Any, learned: Any) -> Any:
        logits = logits_of(graph, files.config, state, tokens, segments)[:-1]
        return cross_entropy(logits, tokens[1:], behind(segments, learned))

    nats, tokens, count = 0.0, 0, len(rows["tokens"])
    for row in range(count):
        given = (jnp.asarray(rows[n][row], jnp.int32) for n in ("tokens", "segments"))
        more, (counted, _) = told(state, *given, jnp.asarray(rows["learned"][row]))
        nats, tokens = nats + float(more), tokens + int(counted)
        progress(row + 1, count)
    if not tokens:
        raise ConfigError("no token of the rows to measure with counts: measure more of them")
    weights = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    return Measured(files.size_bytes, weights, exp(nats / tokens))


def _bytes(array: jax.Array) -> int:
    return array.size // 2 if array.dtype == jnp.int4 else array.nbytes


def speeds(
    models: Mapping[str, tuple[str, str]], prompt: tuple[int, ...], rounds: int, cache_dir: Path
) -> dict[str, float]:
    """Tokens a second of each model (what it is called, and its dtype), one sequence, the median of
    so many rounds by turns."""
    loaded: dict[str, Loaded] = {}
    found: dict[str, list[float]] = {name: [] for name in models}
    try:
        for name, (reference, dtype) in models.items():
            wanted = [f"model.dtype={dtype}", "engine.max_slots=1", 'engine.speculate="off"']
            wanted += [
                f"engine.max_context={_PROMPT + 2 * _MOST_TOKENS}",
                "kv.host_pages=0",
                "kv.pages=16",
            ]
            loaded[name] = load(reference, load_settings(overrides=wanted), cache_dir)
        for _ in range(rounds + 1):
            for name, model in loaded.items():
                found[name].append(asyncio.run(_speed(model, prompt[:_PROMPT])))
    finally:
        for model in loaded.values():
            model.runner.__exit__()
    return {name: statistics.median(each[1:]) for name, each in found.items()}  # warm


async def _speed(model: Loaded, prompt: tuple[int, ...]) -> float:
    count = min(_MOST_TOKENS, model.limits.max_context - len(prompt))
    times: list[float] = []
    async with model.engine() as engine:
        rules = Sampling(count, temperature=0)
        async with engine.stream(Request(engine.new_id(), prompt, rules)) as events:
            times += [
                time.perf_counter() async for event in events if isinstance(event, TokenEvent)
            ]
    return (len(times) - 1) / max(times[-1] - times[0], 1e-9)
