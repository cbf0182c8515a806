"""What a person sees while a model loads: bars for what takes time, one line for what matters.

Everything goes to standard error; standard output is for answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fastserve_jax.runtime.compile import Compiled
from fastserve_jax.runtime.memory import MemoryPlan
from fastserve_jax.weights.load import ModelFiles

console = Console(stderr=True, highlight=False)


class Bars:
    """An assemble.Report that draws. Without a terminal, one line per stage instead."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._cached = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def pull(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        mega = f"{done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB"
        self._show("pulling", stage, done_bytes, total_bytes, mega)
        if stage == "done":
            self._finish("pulling", f"pulled {total_bytes / 1e6:,.0f} MB, checked by sha256")

    def opened(self, files: ModelFiles) -> None:
        licence = f", {files.licence}" if files.licence else ""
        console.print(f"[bold]{files.name}[/] ({files.config.family}{licence})")
        if files.notice:
            console.print(f"[yellow]{files.notice.strip()}[/]")

    def meeting(self, num_hosts: int, coordinator: str) -> None:
        console.print(f"waiting for all {num_hosts} hosts at {coordinator}")

    def weights(self, done: int, total: int) -> None:
        self._show("weights", "reading weights", done, total, f"{done} of {total} tensors")
        if done == total:
            self._finish("weights", f"read {total} tensors")

    def memory(self, plan: MemoryPlan) -> None:
        console.print(f"memory: {plan}")

    def compiled(self, program: Compiled) -> None:
        self._cached += program.cached
        done, total = program.done, program.total
        spent_s = time.perf_counter() - self._began.get("compile", time.perf_counter())
        left = f", about {spent_s / done * (total - done):.0f} s left" if spent_s > 2 else ""
        detail = f"{done} of {total}, {self._cached} cached{left}"
        self._show("compile", "compiling", done, total, detail)
        if done == total:
            self._finish("compile", f"compiled {total} programs, {self._cached} from the cache")

    def _show(self, key: str, description: str, done: int, total: int, detail: str) -> None:
        if key not in self._tasks:
            self._began[key] = time.perf_counter()
            self._tasks[key] = self._progress.add_task(description, total=total, detail=detail)
        self._progress.update(
            self._tasks[key], description=description, completed=done, total=total, detail=detail
        )

    def _finish(self, key: str, line: str) -> None:
        self._progress.remove_task(self._tasks.pop(key))
        console.print(f"{line} in {time.perf_counter() - self._began[key]:.1f} s")


_TRY = {  # by route: a body that shows what it does
    "v1/chat/completions": '{"messages": [{"role": "user", "content": "Hello!"}]}',
    "v1/completions": '{"prompt": "Once upon a time", "max_tokens": 32}',
    "v1/embeddings": '{"input": "Hello!"}',
    "classify": '{"input": "Hello!"}',
}


def ready_lines(names: Sequence[str], url: str, ready_s: float, route: str, key: bool) -> str:
    """The one line to look for, and one to paste."""
    authorization = " -H 'Authorization: Bearer $FASTSERVE_API_KEY'" if key else ""
    return (
        f"[bold green]Ready[/] in {ready_s:.1f} s: {', '.join(names)} at [bold]{url}[/]"
        f" (metrics {url}/metrics)\n"
        f"  curl {url}/{route}{authorization} -H 'Content-Type: application/json'"
        f" -d '{_TRY[route]}'"
    )
