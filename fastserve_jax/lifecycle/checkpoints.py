"""Where training stands, kept by Orbax beside it: written while steps go on, whole or not at all.

Each checkpoint is of a step: the arrays, and where the data stands. The newest few stay, and the
best by what held-out text says. What cannot be read is passed over for the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from fastserve_jax.errors import TrainingFailed


def _loss(metrics: Any) -> float:
    return float(metrics["loss"])


class Checkpoints:
    """Use as `with`, which waits for what is being written."""

    def __init__(
        self, folder: Path, keep: int, report: Callable[[str], None] = lambda _: None
    ) -> None:
        best = BestN(get_metric_fn=_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,
            best_mode="min",
            create=True,
            preservation_policy=AnyPreservationPolicy([LatestN(n=keep), best]),
        )
        self.folder, self._report = folder.absolute(), report
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._manager.close()
        except Exception as failed:
            if error is None:
                raise self._failed(failed) from failed

    def save(self, step: int, state: Any, data: dict[str, Any], loss: float) -> None:
        """Returns when the arrays are copied; they are written beside what follows. Raises
        TrainingFailed, for one that was being written, too."""
        assert math.isfinite(loss), "a model that is no more is not kept"
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        try:
            if step in self._manager.all_steps():  # one that could not be read
                self._manager.delete(step)
            self._manager.save(step, args=parts, metrics={"loss": loss}, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, arrays that lie as `like`, and the data's state; `like` is gone then, that there is
        room for one. Raises TrainingFailed where there are checkpoints and none can be read."""
        return self._first(sorted(self._manager.all_steps(), reverse=True), like)

    def best(self, now: Any, step: int) -> tuple[int, Any, dict[str, Any]] | None:
        """The same of the best; `now` is what there is of `step`."""
        best = self._manager.best_step()
        if best == step:
            return step, now, {}
        others = sorted(self._manager.all_steps(), reverse=True)
        return self._first([s for s in (best, *others) if s is not None], now)

    def _first(self, steps: list[int], like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        parts = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        if steps:
            jax.tree.map(lambda array: array.delete(), like)
        reasons = []
        for step in steps:
            try:
                found = self._manager.restore(step, args=parts)
            except Exception as error:  # a file may be damaged in many ways
                reasons.append(f"{step}: {' '.join(str(error).split())[:200]}")
                self._report(f"checkpoint {reasons[-1]}: passed over")
                continue
            return step, found["state"], found["data"]
        if reasons:
            raise TrainingFailed(f"{self.folder}: no checkpoint can be read: {'; '.join(reasons)}")
        return None

    def _failed(self, error: Exception) -> TrainingFailed:
        known = self._manager.latest_step()
        good = f"the last good one is of step {known}" if known is not None else "there is none yet"
        reason = " ".join(str(error).split())[:300]
        return TrainingFailed(f"a checkpoint cannot be written to {self.folder}: {reason}; {good}")
