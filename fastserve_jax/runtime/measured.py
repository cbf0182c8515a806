"""Keeps what steps cost on this machine, so that a second start runs two steps, not twenty.

What was kept is believed if those two take about what it says. It is only where the cost model
begins: every step that runs corrects it.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import msgspec

from fastserve_jax.core.cost import CostModel

from . import kept
from .calibrate import Runner, calibrate, first_steps

_MOST_OFF = 2.0  # times longer or shorter than kept: the machine is busy, or was, or is another


def measured(
    runner: Runner,
    folder: Path,
    facts: object,
    measure: Callable[[Runner], CostModel] = calibrate,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """The cost model of `runner`'s steps, which `facts` and the machine decide."""
    path = folder / f"{kept.name_of(_machine(), facts, runner.shape)}.json"
    model = _read(path, runner)
    if model is None or not _holds(model, runner, clock):
        model = measure(runner)
        kept.write(path, msgspec.json.encode(model))
    return model


def _machine() -> tuple[object, ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return platform.node(), platform.machine(), cores, jax.devices()[0].device_kind


def _read(path: Path, runner: Runner) -> CostModel | None:
    data = kept.read(path)
    try:
        model = msgspec.json.decode(data or b"", type=CostModel)
    except msgspec.DecodeError:
        return None
    terms = (model.prefill_token_s, model.decode_row_s, model.kv_token_s)
    copies = (model.page_out_s, model.page_in_s)
    fits = model.buckets == runner.shape.token_buckets and len(model.base_s) == len(model.buckets)
    sound = all(map(math.isfinite, (*model.base_s, *terms, *copies)))
    return model if fits and sound and min(model.base_s) > 0 <= min(*terms, *copies) else None


def _holds(model: CostModel, runner: Runner, clock: Callable[[], float]) -> bool:
    for plan in first_steps(runner):
        for _ in range(2):  # a program's first run may be slow
            began = clock()
            runner.run(plan)
            ratio = (clock() - began) / model.step_s(plan.load)
            if 1 / _MOST_OFF <= ratio <= _MOST_OFF:
                break
        else:
            return False
    return True
