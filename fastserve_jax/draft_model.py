"""A second, smaller model that guesses what the first will say: its files, its room, its cost.

Found and checked before anything slow begins. Knows models and vocabularies, no settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import jax
from flax import nnx

from fastserve_jax.core.proposal import DraftCost
from fastserve_jax.core.types import Ask, AskRow, Proposed
from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Decoder, State, abstract
from fastserve_jax.models.precision import Precision
from fastserve_jax.runtime.drafter import DraftShape, draft_programs
from fastserve_jax.runtime.shapes import Program
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.weights.load import ModelFiles, open_model
from fastserve_jax.weights.pull import Progress

MOST_ROWS = 8  # sequences it looks ahead for at once: each costs a whole context of KV pages
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # naïve, 1234.5\n",
    "Größe, 東京, привет, \U0001f600!",
)
_RUNS = 4  # in one measured ask
_TIMES = 3


class Runner(Protocol):
    def run_ask(self, ask: Ask) -> Proposed: ...


@dataclass(frozen=True, slots=True)
class DraftModel:
    """Opened, nothing of it in memory yet."""

    files: ModelFiles
    precision: Precision
    graph: nnx.GraphDef[Decoder]
    empty: State
    shape: DraftShape

    @property
    def config(self) -> ModelConfig:
        return self.files.config

    @property
    def facts(self) -> tuple[object, ...]:
        """What its programs hang on beside code and arguments."""
        return self.config, self.shape, self.precision

    @property
    def bytes(self) -> int:
        """Weights and KV pages."""
        leaves = jax.tree.leaves(self.empty)
        weights = sum(int(leaf.size) * int(leaf.dtype.itemsize) for leaf in leaves)
        return weights + self.shape.kv_bytes(self.config, self.precision.dtype)

    def programs(self) -> Iterator[Program]:
        dtype = self.precision.dtype
        return draft_programs(self.graph, self.config, self.shape, self.empty, dtype)


def open_draft(
    reference: str, cache_dir: Path, files: ModelFiles, progress: Progress
) -> ModelFiles:
    """The files of a draft model for that of `files`. Raises OperatorErrors: what open_model does,
    and ConfigError where the two do not speak of the same tokens."""
    draft = open_model(reference, cache_dir, progress)
    ours, theirs = files.config.vocab_size, draft.config.vocab_size
    why = f"{theirs:,} tokens, {files.name} has {ours:,}" if ours != theirs else ""
    if not why:
        tokenizers = [load_tokenizer(f.tokenizer_source) for f in (files, draft)]
        found = differs(*tokenizers)
        why = f"other tokens for {found!r}" if found is not None else ""
    if why:
        raise ConfigError(
            f"{draft.name} cannot draft for {files.name}: it has {why}. A draft model must have "
            "the same vocabulary: take a smaller one of the same family"
        )
    return draft


def differs(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """A text that the two read differently, of a few; None if they read all alike."""
    probes = (*_PROBES, *sorted(ours.control_texts)[:8])
    return next((p for p in probes if ours.encode_template(p) != theirs.encode_template(p)), None)


def plan_draft(
    files: ModelFiles,
    precision: Precision,
    *,
    max_slots: int,
    max_context: int,
    step_tokens: int,
    page_size: int,
) -> DraftModel:
    """Its shapes, beside a model that is served with those limits."""
    shape = DraftShape(
        rows=min(max_slots, MOST_ROWS),
        context=min(max_context, files.config.max_context),
        page_size=page_size,
        max_slots=max_slots,
        max_context=max_context,
        step_tokens=step_tokens,
    )
    return DraftModel(files, precision, *abstract(files.config, precision), shape)


def measure_draft(
    runner: Runner, shape: DraftShape, clock: Callable[[], float] = time.perf_counter
) -> DraftCost:
    """What it costs on this machine, before any request; every program is run."""

    def seconds(known: int, count: int) -> float:
        row = AskRow(0, 0, known, 0, count)
        began = clock()
        runner.run_ask(Ask((row,)))
        return clock() - began

    longest = shape.context - _RUNS
    for tokens in shape.token_buckets:  # a program's first run may be slow
        seconds(max(1, min(tokens, longest)), 1)
    run_s = median(seconds(1, _RUNS) for _ in range(_TIMES)) / _RUNS
    many = max(1, min(shape.token_buckets[-1], longest))
    many_s = median(seconds(many, 1) for _ in range(_TIMES))
    return DraftCost(run_s, max(0.0, many_s - run_s) / max(1, many - 1))
