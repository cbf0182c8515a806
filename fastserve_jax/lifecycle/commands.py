"""What a person sees of the commands that prepare data and train: progress, curves, a last line."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastserve_jax.config import read_settings
from fastserve_jax.errors import ConfigError, TrainingFailed
from fastserve_jax.runtime.hosts import divide_cpu
from fastserve_jax.terminal import console
from fastserve_jax.weights.registry import REGISTRY, Registry, Version, check_name

from .dataset import Dataset
from .prepare import Wanted, prepare
from .settings import TrainSettings

if TYPE_CHECKING:
    from .search import Tried
    from .train import Point, Trained


def run_prepare(
    files: Sequence[Path], out: Path, wanted: Wanted, tokenizer: str, cache_dir: Path
) -> None:
    from .origin import tokenizer_of

    began = time.perf_counter()
    words = tokenizer_of(tokenizer, cache_dir) if tokenizer else None
    with console.status("reading") as status:

        def told(stage: str, done: int) -> None:
            status.update(f"{stage}: {done:,} documents")

        facts = prepare(files, out, wanted, words, told)
    left_out = f"{facts.repeated:,} there twice"
    left_out += f", {facts.near:,} nearly so" if wanted.near else ""
    left_out += f", {facts.unanswered:,} with no answer in a row" if facts.unanswered else ""
    left_out += f" and {facts.empty:,} empty ones left out"
    left_out += f"; {facts.cut:,} longer than a row cut" if facts.cut else ""
    console.print(
        f"{facts.documents:,} documents ({left_out}), {facts.tokens:,} to be learned, in "
        f"{facts.train_rows:,} rows of {facts.context} and {facts.valid_rows:,} to measure with; "
        f"{time.perf_counter() - began:.0f} s"
    )


def _register(settings: TrainSettings, done: Trained, cache_dir: Path) -> Version:
    return Registry(cache_dir / REGISTRY).add(
        settings.name,
        done.folder,
        "train",
        parent=settings.base,
        data=Dataset(Path(settings.data)).facts.fingerprint,
        settings=msgspec.to_builtins(settings),
        metrics={"valid_loss": done.valid_loss, "steps": done.best_step},
    )


def run_train(settings: TrainSettings, cache_dir: Path) -> None:
    if settings.mesh.cpu_devices:
        divide_cpu(settings.mesh.cpu_devices)
    from .curves import draw
    from .origin import open_base, open_teacher
    from .train import checked, train

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    settings = replace(settings, base=Registry(cache_dir / REGISTRY).pinned(settings.base))
    if settings.name:
        check_name(settings.name)  # before hours are spent
    what = "text" if checked(settings)[0].facts.labels else "token"
    base = open_base(settings, cache_dir) if settings.base else None
    teacher = open_teacher(settings, cache_dir)
    began = time.perf_counter()
    with _written(settings.out), Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=settings.steps, said="")

        def report(point: Point) -> None:
            said = f"loss {point.loss:.3f}, {point.tokens_per_s:,.0f} {what}s/s"
            bar.update(task, completed=point.step, said=said)
            if point.valid_loss is not None:
                console.print(
                    f"step {point.step}: loss {point.loss:.3f}, held out {point.valid_loss:.3f} "
                    f"({point.valid_accuracy:.1%} right), {point.tokens_per_s:,.0f} {what}s/s"
                )

        done = train(settings, report, console.print, base, teacher)
    model = str(done.folder)
    if settings.name:
        model = str(_register(settings, done, cache_dir))
    picture = draw(Path(settings.out), what)
    shown = f"; curves in {picture}" if picture else ""
    console.print(
        f"{done.steps} steps in {time.perf_counter() - began:,.0f} s; the best is of step "
        f"{done.best_step}, held out {done.valid_loss:.3f}{shown}\n"
        f"  fastserve serve {_served(settings, model)}",
        soft_wrap=True,
    )


@contextmanager
def _written(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingFailed(f"{out} cannot be written: {error}; what is there stays") from error


def _served(settings: TrainSettings, model: str) -> str:
    if settings.lora.merge:
        return shlex.quote(model)
    name = settings.name or Path(settings.out).resolve().name
    return f"{shlex.quote(settings.base)} --adapter {shlex.quote(f'{name}={model}')}"


def run_search(config: Path | None, sets: Sequence[str], cache_dir: Path) -> None:
    from .origin import open_base, open_teacher
    from .search import Searching, search
    from .train import ADAPTER, MODEL, checked, train

    asked = read_settings(Searching, config, sets)
    asked.check()
    if asked.name:
        raise ConfigError("a search registers nothing: leave `name` out, and train the best again")
    pinned = cache(Registry(cache_dir / REGISTRY).pinned)  # of all trials the same
    columns = TextColumn("{task.description}")
    with _written(asked.out), Progress(columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def run(
            chosen: Mapping[str, Any], folder: Path, report: Callable[[Point], None]
        ) -> Trained:
            given = [
                f"{name}={msgspec.json.encode(value).decode()}" for name, value in chosen.items()
            ]
            own = read_settings(Searching, config, [*sets, *given, f"out={folder}"])
            own = replace(own, base=pinned(own.base))
            checked(own)
            base = open_base(own, cache_dir) if own.base else None

            def heard(point: Point) -> None:
                bar.update(task, description=f"{folder.name}: step {point.step} of {own.steps}")
                report(point)

            return train(own, heard, base=base, teacher=open_teacher(own, cache_dir))

        def told(tried: Tried) -> None:
            console.print(_tried(tried), highlight=False)

        best = search(asked.search, asked, run, told)
    made = f"{asked.out}/trial-{best.number}/{MODEL if asked.lora.merge else ADAPTER}"
    console.print(f"best: {_tried(best)}\n  {made}", highlight=False, soft_wrap=True)


def _tried(tried: Tried) -> str:
    found = "given up" if tried.valid_loss is None else f"held out {tried.valid_loss:.4f}"
    said = ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in tried.settings.items()
    )
    return f"trial {tried.number}: {found} with {said}"
