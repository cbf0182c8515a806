"""Many cells over all cores: capacities first, each once, and the cells that wait for them after.

Knows processes; nothing of what a cell is about.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from ..errors import ConfigError
from .run import Cell, Outcome, Tell, capacity, run_cell

_PARTS = 1000  # of a run, for progress
_POLL_S = 0.2

# In a worker process: where all of them add what they have done. Set once, as the process starts.
_done: Synchronized[int] | None = None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_cells(
    cells: list[Cell], jobs: int, tell: Callable[[float, int], None] = lambda done, of: None
) -> list[Outcome]:
    """The outcomes in the order of `cells`. `tell` hears how many runs are done, in parts of runs,
    and of how many. Raises the first ConfigError of any cell."""
    if jobs < 1:
        raise ConfigError("--jobs must be at least 1")
    grounds = {cell.ground: cell for cell in cells if cell.rho is not None}
    runs = len(cells) + len(grounds)
    workers = min(jobs, max(len(cells), len(grounds)))
    if workers == 1:
        return _here(cells, grounds, lambda done: tell(done, runs))
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _enter, (done,)) as pool:
        try:
            return _spread(pool, cells, grounds, lambda: tell(done.value / _PARTS, runs))
        except BaseException as error:
            # Nobody wants what the others would find out; leaving the pool would wait for it.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ConfigError(
                    "a simulation's process was killed, as happens when memory runs out: "
                    "try fewer --jobs or a smaller --n"
                ) from error
            raise


def _here(cells: list[Cell], grounds: dict[str, Cell], tell: Tell) -> list[Outcome]:
    over = 0
    capacities: dict[str, float] = {}
    outcomes = []

    def part(share: float) -> None:
        tell(over + share)

    for key, cell in grounds.items():
        capacities[key] = capacity(cell, part)
        over += 1
    for cell in cells:
        of_capacity = None if cell.rho is None else capacities[cell.ground]
        outcomes.append(run_cell(cell, of_capacity, part))
        over += 1
    tell(over)
    return outcomes


def _spread(
    pool: ProcessPoolExecutor,
    cells: list[Cell],
    grounds: dict[str, Cell],
    tell: Callable[[], None],
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    measuring: dict[Future[float], str] = {}
    running: dict[Future[Outcome], int] = {}

    def start(chosen: Iterable[int], found: float | None) -> None:
        for i in chosen:
            running[pool.submit(_run_cell, cells[i], found)] = i

    for key, cell in grounds.items():
        measuring[pool.submit(_capacity, cell)] = key
    start((i for i, cell in enumerate(cells) if cell.rho is None), None)
    while measuring or running:
        both: list[Future[Any]] = [*measuring, *running]
        over, _ = wait(both, _POLL_S, FIRST_COMPLETED)
        for future in list(measuring):
            if future in over:
                key = measuring.pop(future)
                start(
                    (i for i, c in enumerate(cells) if c.rho is not None and c.ground == key),
                    future.result(),
                )
        for ended in list(running):
            if ended in over:
                outcomes[running.pop(ended)] = ended.result()
        tell()
    return [outcomes[i] for i in range(len(cells))]


# In the worker


def _enter(done: Synchronized[int]) -> None:
    global _done
    _done = done
    # Ctrl-C reaches every process of the terminal; the parent is the one that has to say something.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _teller() -> Tell:
    told = 0

    def tell(share: float) -> None:
        nonlocal told
        parts = int(share * _PARTS)
        if parts > told and _done is not None:
            with _done.get_lock():
                _done.value += parts - told
            told = parts

    return tell


def _capacity(cell: Cell) -> float:
    tell = _teller()
    found = capacity(cell, tell)
    tell(1.0)
    return found


def _run_cell(cell: Cell, of_capacity: float | None) -> Outcome:
    tell = _teller()
    outcome = run_cell(cell, of_capacity, tell)
    tell(1.0)
    return outcome
