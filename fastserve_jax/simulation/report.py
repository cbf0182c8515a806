"""What a person at the terminal sees of a study: a bar while it runs, then one table.

Knows outcomes and rich; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from .measures import SLO_S, Row, slo_throughput
from .run import Outcome

console = Console(stderr=True, highlight=False)  # standard output is for the table


class _Column(NamedTuple):
    title: str
    key: str  # of a row
    form: str
    factor: float = 1.0
    compared: bool = False  # with the first policy


_COLUMNS = (
    _Column("mean\nJCT s", "jct_mean_s", ".2f", compared=True),
    _Column("P99\nJCT s", "jct_p99_s", ".1f", compared=True),
    _Column("P99\nTTFT s", "ttft_p99_s", ".2f", compared=True),
    _Column("s per\ntoken", "normalized_latency_mean_s", ".3f", compared=True),
    _Column("tokens\nper s", "tokens_per_s", ".1f", compared=True),
    _Column("stall\n%", "swap_stall_fraction", ".1f", factor=100),
    _Column("preempted\nper req.", "preemptions_per_request", ".2f"),
    _Column("µs per\nstep", "plan_commit_us", ".0f"),
)


@contextmanager
def bar() -> Iterator[Callable[[float, int], None]]:
    """What run_cells tells, drawn; nothing is left of it afterwards."""
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.0f} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal  # it would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=1)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def show(outcomes: list[Outcome]) -> None:
    """The table on standard output, with what it needs to be read."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=140)  # a file has room for every column
    out.print(heading(outcomes), markup=False)
    out.print()
    out.print(table(outcomes))
    for line in remarks(outcomes):
        out.print(line, markup=False)


def policies(outcomes: list[Outcome]) -> list[str]:
    """As they were given; the first is what the others are compared with."""
    return list(dict.fromkeys(str(outcome.row["policy"]) for outcome in outcomes))


def rhos(outcomes: list[Outcome]) -> list[float | None]:
    return list(dict.fromkeys(outcome.cell.rho for outcome in outcomes))


def average(outcomes: list[Outcome], policy: str, rho: float | None, key: str) -> float:
    """Of `key` over the seeds; NaN where no seed has it."""
    values = [
        value
        for outcome in outcomes
        if outcome.row["policy"] == policy and outcome.cell.rho == rho
        if isinstance(value := outcome.row[key], int | float)
    ]
    return float(np.mean(values)) if values else float("nan")


def table(outcomes: list[Outcome]) -> Table:
    """Averages over the seeds; below them, the multiples of the first policy's."""
    names = policies(outcomes)
    drawn = Table(Column("policy", overflow="fold"), "rho", box=None, pad_edge=False)
    for column in _COLUMNS:
        drawn.add_column(column.title, justify="right", no_wrap=True)
    for rho in rhos(outcomes):
        first = [average(outcomes, names[0], rho, column.key) for column in _COLUMNS]
        for name in names:
            values = [average(outcomes, name, rho, column.key) for column in _COLUMNS]
            shown = map(_shown, _COLUMNS, values)
            drawn.add_row(name, "" if rho is None else f"{rho:g}", *shown)
            if name != names[0]:
                drawn.add_row("", "", *map(_multiple, _COLUMNS, values, first), style="dim")
        drawn.add_row()
    return drawn


def _shown(column: _Column, value: float) -> str:
    return "-" if np.isnan(value) else f"{value * column.factor:{column.form}}"


def _multiple(column: _Column, value: float, of: float) -> str:
    return f"{value / of:.2f}x" if column.compared and of > 0 and not np.isnan(value) else ""


def heading(outcomes: list[Outcome]) -> str:
    """What all runs have in common."""
    row, cell = outcomes[0].row, outcomes[0].cell
    pages = sorted({int(outcome.limits.num_pages) for outcome in outcomes})
    shown = f"{pages[0]:,}" if len(pages) == 1 else f"{pages[0]:,} to {pages[-1]:,}"
    seeds = len({outcome.cell.seed for outcome in outcomes})
    parts = [
        f"{row['load']}: {row['requests']:,} requests",
        f"{cell.slots} slots",
        f"{shown} pages of {cell.page_size} tokens",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
    ]
    found = {outcome.cell.seed: outcome.capacity for outcome in outcomes if outcome.capacity}
    if found:
        parts.append(f"FCFS completes {np.mean(list(found.values())):.3g} requests/s")
    return ", ".join(parts)


def remarks(outcomes: list[Outcome]) -> list[str]:
    """What the table does not say: who is missing from it, and which load holds the SLO."""
    lines = []
    by_seed = {outcome.cell.seed: outcome for outcome in outcomes}
    dropped = max(outcome.dropped for outcome in outcomes)
    if dropped:
        lines.append(f"{dropped:,} rows of the trace ask for no output and were dropped")
    left_out = sum(outcome.left_out for outcome in by_seed.values())
    if left_out:
        lines.append(f"{left_out:,} requests could never fit the pool and were left out for all")
    for name in policies(outcomes):
        of = [outcome for outcome in outcomes if outcome.row["policy"] == name]
        unfinished = sum(int(outcome.row["unfinished"] or 0) for outcome in of)
        if unfinished:
            total = sum(int(outcome.row["requests"] or 0) for outcome in of)
            lines.append(f"{name}: {unfinished:,} of {total:,} requests did not finish")
    return lines + _routed(outcomes) + _held(outcomes)


def _routed(outcomes: list[Outcome]) -> list[str]:
    """Of several replicas: how they were used, and what would be the bound with more of them."""
    lines = []
    for outcome in outcomes:
        row, cell = outcome.row, outcome.cell
        if cell.replicas == 1 or cell.seed:
            continue

        def number(key: str, row: Row = row) -> float:
            value = row[key]
            assert isinstance(value, int | float)
            return value

        at = "" if cell.rho is None else f" at {cell.rho:g}"
        lines += [
            f"{row['policy']}{at}: {cell.replicas:,} replicas are busy {number('busy_share'):.0%}, "
            f"one has {number('most_sent_over_mean'):.2f}x the mean of requests, "
            f"{number('cached_share'):.0%} of prompts is cached",
            f"  the router ({cell.router}) decides in {number('route_us'):.1f} µs, "
            f"{number('router_share'):.1%} of this core; {number('router_most_per_s'):,.0f} "
            f"requests/s would fill it. A scheduler takes {number('scheduler_share'):.1%} of its "
            "replica's steps",
        ]
    return lines


def _held(outcomes: list[Outcome]) -> list[str]:
    loads = [rho for rho in rhos(outcomes) if rho is not None]
    if len(loads) < 2:
        return []
    texts = []
    for name in policies(outcomes):
        points = [(r, average(outcomes, name, r, "normalized_latency_mean_s")) for r in loads]
        held = slo_throughput(points)
        if held is not None:
            sign = {"=": "", ">": "above ", "<": "below "}[held.sign]
            texts.append(f"{name} {sign}{held.rho:.2f}")
    return [f"a mean of {SLO_S:g} s/token is held up to rho: {', '.join(texts)}"]
