"""`fastserve search`: the same training with other numbers, again and again, by optuna.

Each trial is a run of its own in a folder of its own, and what came of all is kept: a search that
was interrupted goes on. The best by held-out text is what is told.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve_jax.errors import ConfigError, TrainingFailed

from .settings import TrainSettings
from .train import Point, Trained

METHODS = ("bayesian", "random", "grid")
KEPT = "search.db"

type Run = Callable[[Mapping[str, Any], Path, Callable[[Point], None]], Trained]


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float
    log: bool = False  # drawn evenly by its logarithm


@dataclass(frozen=True, slots=True)
class Search:
    """`space` is what is tried, by the setting's name: a list of values, or a range of numbers."""

    method: str = "bayesian"
    trials: int = 20
    space: dict[str, Range | list[Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ConfigError."""
        if self.method not in METHODS:
            raise ConfigError(f"no method {self.method}: there are {', '.join(METHODS)}")
        if not self.space:
            raise ConfigError("search.space is empty: name a setting and what to try")
        if self.method == "grid" and any(isinstance(own, Range) for own in self.space.values()):
            raise ConfigError("a grid has lists of values, no ranges")


@dataclass(frozen=True, slots=True)
class Searching(TrainSettings):
    """What a file for `search` says."""

    search: Search = field(default_factory=Search)


@dataclass(frozen=True, slots=True)
class Tried:
    number: int
    settings: Mapping[str, Any]
    valid_loss: float | None  # None: it failed, or was given up


def search(
    what: Search, settings: TrainSettings, run: Run, report: Callable[[Tried], None]
) -> Tried:
    """The best of all trials. `run` trains with such settings into such a folder. One that is worse
    than most were at the same step is given up (Golovin et al., "Vizier", 2017, the median rule).
    Raises ConfigError, and TrainingFailed where none ended."""
    import optuna

    what.check()
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{(out / KEPT).absolute()}",
        sampler=_sampler(what, settings.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
        load_if_exists=True,
    )

    def objective(trial: Any) -> float:
        chosen = {name: _drawn(trial, name, own) for name, own in what.space.items()}
        folder = out / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)

        def heard(point: Point) -> None:
            if point.valid_loss is None:
                return
            trial.report(point.valid_loss, point.step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return run(chosen, folder, heard).valid_loss

    def told(_: Any, trial: Any) -> None:
        ended = trial.state == optuna.trial.TrialState.COMPLETE
        report(Tried(trial.number, trial.params, trial.value if ended else None))

    left = what.trials - sum(trial.state.is_finished() for trial in study.trials)
    if left > 0:
        study.optimize(objective, left, catch=(TrainingFailed,), callbacks=[told])
    ended = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not ended:
        raise TrainingFailed(f"none of {len(study.trials)} trials came to its end")
    best = study.best_trial
    return Tried(best.number, best.params, best.value)


def _sampler(what: Search, seed: int) -> Any:
    import optuna

    if what.method == "grid":
        return optuna.samplers.GridSampler(what.space, seed=seed)
    if what.method == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


def _drawn(trial: Any, name: str, own: Range | list[Any]) -> Any:
    if isinstance(own, list):
        return trial.suggest_categorical(name, own)
    return trial.suggest_float(name, own.low, own.high, log=own.log)
