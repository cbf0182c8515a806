"""Compiles every program before the first request, and counts what is compiled after.

The persistent cache makes a second start short; `progress` tells which programs came from it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
from jax import monitoring

from .shapes import Program

MOST_THREADS = 8  # a compiler of large programs takes a GB
_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One program, ready: the `done`-th of `total`."""

    name: str
    done: int
    total: int
    cached: bool
    elapsed_s: float


def keep_compiled(folder: Path) -> None:
    """Use `folder` as the persistent cache, for programs of any size and any compile time.
    A `JAX_COMPILATION_CACHE_DIR` that is set says otherwise: many servers may share one."""
    settings = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


def compile_all(
    programs: Iterable[Program],
    progress: Callable[[Compiled], None] = lambda _: None,
    lower: Callable[[Program], jax.stages.Lowered] = Program.lower,
    threads: int | None = None,
) -> dict[str, jax.stages.Compiled]:
    """name -> program. Tracing holds the interpreter, so it is done here, one after the other;
    compiling does not, and goes on beside it, by default on all cores there are for it."""
    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    jobs = list(programs)
    lock = threading.Lock()
    compiled: dict[str, jax.stages.Compiled] = {}

    def build(name: str, lowered: jax.stages.Lowered) -> None:
        began = time.perf_counter()
        with CompileCounter(own_thread=True) as counter:
            program = lowered.compile()
        with lock:
            compiled[name] = program
            elapsed_s = time.perf_counter() - began
            progress(Compiled(name, len(compiled), len(jobs), counter.cache_hits > 0, elapsed_s))

    with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
        pending = [pool.submit(build, job.name, lower(job)) for job in jobs]
        for done in pending:
            done.result()
    return compiled


class CompileCounter:
    """Counts compilations while entered: in all threads, or in the one that entered."""

    def __init__(self, own_thread: bool = False) -> None:
        self.compiles = 0  # programs handed to the compiler or fetched from the cache
        self.cache_hits = 0
        self._thread = threading.get_ident() if own_thread else None
        self._paused = 0

    def __enter__(self) -> Self:
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._on_duration)
        monitoring.unregister_event_listener(self._on_event)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While something is loaded, whose programs are meant to be compiled."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _counts(self) -> bool:
        return not self._paused and self._thread in (None, threading.get_ident())

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and self._counts():
            self.compiles += 1

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _CACHE_HIT and self._counts():
            self.cache_hits += 1
