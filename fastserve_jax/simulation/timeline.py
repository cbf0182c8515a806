"""The scheduler over time, one row for each policy: who runs and waits, and where pages are.

Knows samples and how they are drawn; runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.simulate import Sample
from .canvas import (
    CACHED,
    DEVICE,
    FAINT,
    HOST,
    INK,
    WAITING,
    heading,
    panels,
    save,
    shades,
)
from .report import policies
from .run import Outcome
from .workload import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 800
_MOST_LEVELS = 6  # in one picture; those below are one


def timeline(outcomes: list[Outcome], under: str, path: Path) -> Path:
    """Of each policy's sampled run."""
    sampled = {str(o.row["policy"]): o for o in outcomes if o.samples}
    names = [name for name in policies(outcomes) if name in sampled]
    rho = sampled[names[0]].cell.rho
    figure, axes = panels(
        "The scheduler over time",
        under if rho is None else f"{under}   ·   load {rho:g}",
        len(names),
        2,
        width=6.4,
        height=2.5,
        sharex=True,
    )
    most_live = max(s.running + s.waiting for o in sampled.values() for s in o.samples)
    for i, name in enumerate(names):
        outcome = sampled[name]
        samples = outcome.samples[:: len(outcome.samples) // _MOST_POINTS + 1]
        _requests(axes[2 * i], samples)
        axes[2 * i].set_ylim(0, max(1, most_live) * 1.04)
        heading(axes[2 * i], name)
        _pages(axes[2 * i + 1], samples, outcome)
        if i == len(names) - 1:
            axes[2 * i].set_xlabel("time (s)")
            axes[2 * i + 1].set_xlabel("time (s)")
    last_s = max(o.samples[-1].time_s for o in sampled.values())
    axes[0].set_xlim(0, max(last_s, 1e-3))
    return save(figure, path)


def _requests(axes: Axes, samples: list[Sample]) -> None:
    """Live requests by level where the policy has levels, by phase where not."""
    time_s = np.array([s.time_s for s in samples])
    running = np.array([s.running for s in samples])
    levels = _levels(samples)
    if len(levels) > 1:
        names = ["level 0", *map(str, range(1, len(levels)))]
        if len(levels) == _MOST_LEVELS:
            names[-1] += " and below"
        colors = shades(len(levels))
        axes.stackplot(time_s, *levels, labels=names, colors=colors, linewidth=0)
        axes.plot(time_s, running, color="white", linewidth=2.6)
        axes.plot(time_s, running, color=INK, linewidth=1.1, label="running")
    else:
        waiting = np.array([s.waiting for s in samples])
        parts = {"running": (running, DEVICE), "waiting": (waiting, WAITING)}
        axes.stackplot(
            time_s,
            *(values for values, _ in parts.values()),
            labels=list(parts),
            colors=[color for _, color in parts.values()],
            linewidth=0,
        )
    axes.set_ylabel("requests")
    _above(axes)


def _levels(samples: list[Sample]) -> list[FloatArray]:
    """Counts over time of each level up to the last that anybody reached."""
    width = max((len(s.levels) for s in samples), default=0)
    counts = np.zeros((len(samples), max(width, 1)))
    for i, sample in enumerate(samples):
        counts[i, : len(sample.levels)] = sample.levels
    used = int(np.flatnonzero(counts.any(axis=0))[-1]) + 1 if counts.any() else 0
    shown = [counts[:, i] for i in range(min(used, _MOST_LEVELS))]
    if used > _MOST_LEVELS:
        shown[-1] = counts[:, _MOST_LEVELS - 1 :].sum(axis=1)
    return shown


def _pages(axes: Axes, samples: list[Sample], outcome: Outcome) -> None:
    """Upwards what is on the device, of what there is; downwards what is in host memory."""
    time_s = np.array([s.time_s for s in samples])
    used = np.array([s.pages_used for s in samples])
    cached = np.array([s.pages_cached for s in samples])
    host = np.array([s.host_pages_used for s in samples])
    names = ["in use on the device", "kept there for their prefix"]
    axes.stackplot(time_s, used, cached, labels=names, colors=[DEVICE, CACHED], linewidth=0)
    axes.plot(time_s, host, color="white", linewidth=3.2)
    axes.plot(time_s, host, color=HOST, linewidth=1.8, label="in host memory")
    axes.axhline(outcome.limits.num_pages, color=FAINT, linewidth=1.0, linestyle=(0, (4, 2)))
    most = max(outcome.limits.num_pages, int(host.max(initial=0)))
    axes.set_ylim(0, most * 1.08)
    axes.annotate(
        f"the device has {outcome.limits.num_pages:,}",
        (1, outcome.limits.num_pages),
        (-3, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7.5,
        color=FAINT,
        ha="right",
        va="bottom",
    )
    axes.set_ylabel("KV pages")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _above(axes)


def _above(axes: Axes) -> None:
    """The legend in the title's line, where it hides nothing."""
    count = len(axes.get_legend_handles_labels()[0])
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=count,
        columnspacing=1.0,
        handlelength=1.2,
        handletextpad=0.5,
        frameon=False,
        labelcolor=INK,
        fontsize=7.5 if count < 6 else 6.8,
    )
