"""`fastserve search`: the same training with other numbers, again and again, by optuna.

Each trial is a run of its own in a folder of its own, and what came of all is kept: a search that
was interrupted goes on. The best by held-out text is what is told.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve_jax.errors import ConfigError, TrainingFailed

from .settings import TrainSettings
from .train import CHECKPOINTS, Point, Trained

METHODS = ("bayesian", "random", "grid")
KEPT = "search.db"

type Run = Callable[[Mapping[str, Any], Path, Callable[[Point], None]], Trained]


@dataclass(frozen=True, slots=True)
class Range:
    """Of whole numbers where both ends are."""

    low: int | float
    high: int | float
    log: bool = False  # drawn evenly by its logarithm

    def can_be(self) -> bool:
        is_finite = math.isfinite(self.low) and math.isfinite(self.high)
        return is_finite and self.low <= self.high and (self.low > 0 or not self.log)


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
        for name, own in self.space.items():
            if not (own.can_be() if isinstance(own, Range) else own):
                raise ConfigError(
                    f"search.space: {name} has nothing to try: a list with values, or low below "
                    "high, and above 0 where it is log"
                )
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
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
        load_if_exists=True,
    )
    # What goes on draws other numbers than it began with.
    study.sampler = _sampler(what, settings.seed, len(study.trials))

    def objective(trial: Any) -> float:
        try:
            chosen = {name: _drawn(trial, name, own) for name, own in what.space.items()}
        except ValueError as error:  # optuna keeps what a setting's values were
            raise _Stopped from ConfigError(
                f"{out / KEPT} is of another search.space ({error}): take another `out`"
            )
        folder = out / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)

        def heard(point: Point) -> None:
            if point.valid_loss is None:
                return
            trial.report(point.valid_loss, point.step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            return run(chosen, folder, heard).valid_loss
        except (TrainingFailed, optuna.TrialPruned):
            raise
        except BaseException as error:
            raise _Stopped from error
        finally:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nobody goes on from them

    def told(_: Any, trial: Any) -> None:
        ended = trial.state == optuna.trial.TrialState.COMPLETE
        report(Tried(trial.number, trial.params, trial.value if ended else None))

    left = what.trials - sum(trial.state.is_finished() for trial in study.trials)
    if what.method == "grid" and study.sampler.is_exhausted(study):
        left = 0
    if left > 0:
        try:
            study.optimize(objective, left, catch=(TrainingFailed,), callbacks=[told])
        except _Stopped as stopped:
            raise stopped.__cause__ or stopped from None
    ended = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not ended:
        raise TrainingFailed(f"none of {len(study.trials)} trials came to its end")
    best = study.best_trial
    return Tried(best.number, best.params, best.value)


class _Stopped(BaseException):
    """What ends the search and is no trial's own: that one is not counted, as if it was killed.
    Optuna counts all that it knows as errors, a person's interrupt among them."""


def _sampler(what: Search, seed: int, known: int) -> Any:
    """A grid has one order; others begin elsewhere by how many trials are `known`."""
    import optuna

    if what.method == "grid":
        return optuna.samplers.GridSampler(what.space, seed=seed)
    if what.method == "random":
        return optuna.samplers.RandomSampler(seed=seed + known)
    return optuna.samplers.TPESampler(seed=seed + known)


def _drawn(trial: Any, name: str, own: Range | list[Any]) -> Any:
    if isinstance(own, list):
        return trial.suggest_categorical(name, own)
    if isinstance(own.low, int) and isinstance(own.high, int):
        return trial.suggest_int(name, own.low, own.high, log=own.log)
    return trial.suggest_float(name, own.low, own.high, log=own.log)
