"""What a person sees of `fastserve compress`: progress, what came of it, and where it is."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.precision import Stored
from fastserve_jax.terminal import Bars, console
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.weights.load import ModelFiles, open_folder, open_model
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry, check_name

from ..dataset import TRAIN, VALID, Dataset
from ..origin import arrays_of
from ..vocabulary import copy_vocabulary
from ..writing import writing
from .effort import Effort
from .measure import Measured, perplexity, speeds
from .prune import Pruning, prune, zeros
from .quantise import Quantising, quantise
from .seen import Text

type Rows = Mapping[str, NDArray[Any]]
type Step = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Made:
    config: ModelConfig
    parameters: Mapping[str, NDArray[Any]]
    stored: Mapping[str, Stored]
    metrics: Mapping[str, float]


def run_quantise(
    reference: str, folder: Path, name: str, asked: Quantising, effort: Effort, cache_dir: Path
) -> None:
    """Raises ConfigError, DataError, ModelFileError."""

    def make(files: ModelFiles, text: Text, step: Step) -> _Made:
        parameters, stored = quantise(files.config, arrays_of(files), asked, text, step)
        return _Made(files.config, parameters, stored, {})

    _run(reference, folder, name, {"quantise": asdict(asked)}, make, effort, cache_dir)


def run_prune(
    reference: str, folder: Path, name: str, asked: Pruning, effort: Effort, cache_dir: Path
) -> None:
    """Raises ConfigError, DataError, ModelFileError."""

    def make(files: ModelFiles, text: Text, step: Step) -> _Made:
        config, arrays = prune(files.config, arrays_of(files), asked, text, step)
        return _Made(config, arrays, {}, {"zeros": zeros(arrays)})

    _run(reference, folder, name, {"prune": asdict(asked)}, make, effort, cache_dir)


def _run(
    reference: str,
    folder: Path,
    name: str,
    settings: Mapping[str, object],
    make: Callable[[ModelFiles, Text, Step], _Made],
    effort: Effort,
    cache_dir: Path,
) -> None:
    check_name(name)  # before minutes are spent
    registry = Registry(cache_dir / REGISTRY)
    reference = registry.pinned(reference)
    began = time.perf_counter()
    with Bars() as bars:
        files = open_model(reference, cache_dir, bars.pull)
    train, valid = (
        _rows(files, folder, *each) for each in ((TRAIN, effort.calibrate), (VALID, effort.measure))
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        writing(cache_dir) as scratch,
        Progress(*columns, console=console, transient=True) as bar,
    ):

        def step(what: str) -> Step:
            task = bar.add_task(what, total=None)
            return lambda done, of: bar.update(task, completed=done, total=of)

        made = make(files, Text.of(train), step("layers"))
        path = scratch / name
        _write(path, files, made)
        dtype = "auto" if files.stored else "bf16"
        measured = {
            "before": perplexity(files, dtype, valid, cache_dir, step("before")),
            "after": perplexity(open_folder(path, name), "auto", valid, cache_dir, step("after")),
        }
        rates = {}
        if effort.rounds:
            both = {"before": (reference, dtype), "after": (str(path), "auto")}
            rates = speeds(both, tuple(map(int, valid["tokens"][0])), effort.rounds, cache_dir)
        metrics = _metrics(measured, rates) | dict(made.metrics)
        version = registry.add(
            name,
            path,
            "compress",
            parent=reference,
            data=Dataset(folder).facts.fingerprint,
            settings={**settings, "effort": asdict(effort)},
            metrics=metrics,
        )
    _show(metrics, made.stored)
    console.print(
        f"{version} in {time.perf_counter() - began:,.0f} s\n  fastserve serve {version}",
        highlight=False,
    )


def _rows(files: ModelFiles, folder: Path, part: str, count: int) -> Rows:
    """Some of a prepared folder, from all over it."""
    data = Dataset(folder)
    vocab_size = load_tokenizer(files.tokenizer_source).vocab_size
    if data.facts.kind != "text" or data.facts.vocab_size != vocab_size:
        raise ConfigError(
            f"{folder} is not text in the vocabulary of {files.name}: prepare it with --tokenizer "
            f"{files.name}"
        )
    arrays = data.arrays(part)
    there = len(arrays["tokens"])
    if not there:
        raise ConfigError(f"{folder} has nothing in {part}: prepare it with another --holdout")
    chosen = np.unique(np.linspace(0, there - 1, min(count, there)).astype(int))
    return {of: array[chosen] for of, array in arrays.items()}


def _write(path: Path, files: ModelFiles, made: _Made) -> None:
    coded = {f"{matrix}.{part}" for matrix in made.stored for part in ("weight", "scale")}
    kept = {
        name: array if name in coded else array.astype(ml_dtypes.bfloat16)
        for name, array in made.parameters.items()
    }
    write_model(path, made.config, kept, made.stored)
    copy_vocabulary(files.tokenizer_source, path)
    advised = path / "generation_config.json"
    if files.sampling and not advised.exists():
        advised.write_text(json.dumps(dict(files.sampling)))


def _metrics(measured: Mapping[str, Measured], rates: Mapping[str, float]) -> dict[str, float]:
    found = {"valid_loss": log(measured["after"].perplexity)}
    for when, of in measured.items():
        found[f"file_bytes_{when}"] = of.file_bytes
        found[f"weight_bytes_{when}"] = of.weight_bytes
        found[f"perplexity_{when}"] = of.perplexity
        if when in rates:
            found[f"tokens_per_s_{when}"] = rates[when]
    return found


def _show(metrics: Mapping[str, float], stored: Mapping[str, Stored]) -> None:
    table = Table("", "before", "after", "", box=None, pad_edge=False)
    said = {
        "file_bytes": ("files, MB", 1e-6),
        "weight_bytes": ("weights in memory, MB", 1e-6),
        "perplexity": ("perplexity", 1),
        "tokens_per_s": ("tokens/s, one sequence", 1),
    }
    for name, (what, unit) in said.items():
        if f"{name}_before" in metrics:
            before, after = (metrics[f"{name}_{when}"] for when in ("before", "after"))
            numbers = (f"{number * unit:,.2f}" for number in (before, after))
            table.add_row(what, *numbers, f"{after / before - 1:+.1%}")
    if "zeros" in metrics:
        table.add_row("zeros in the layers' matrices", "", f"{metrics['zeros']:.1%}", "")
    Console().print(table)
    kinds = Counter(of.kind + (f" by {of.group}" if of.group else "") for of in stored.values())
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        Console().print(f"matrices: {counts}", highlight=False)
