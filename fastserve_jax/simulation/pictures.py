"""Pictures of a study, as PNG: when requests complete, which load holds the SLO, and whom a policy
lets wait. Knows outcomes and how they are drawn; runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BOUND, FAINT, heading, looks, panels, save, seconds_axis, shared_legend
from .measures import SLO_S, by_decile, slo_throughput
from .report import average, policies, rhos
from .run import Outcome
from .timeline import timeline
from .workload import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_CURVE_POINTS = 1500  # of a CDF; more cannot be seen


def draw(outcomes: list[Outcome], folder: Path) -> list[Path]:
    """Every picture that these outcomes have something for; returns their paths."""
    drawn = [
        completion(outcomes, folder / "completion.png"),
        slo(outcomes, folder / "slo.png"),
        by_length(outcomes, folder / "by-length.png"),
    ]
    if any(outcome.samples for outcome in outcomes):
        drawn.append(timeline(outcomes, under(outcomes), folder / "timeline.png"))
    return drawn


def under(outcomes: list[Outcome]) -> str:
    """The line below a title: what was run."""
    cell, limits = outcomes[0].cell, outcomes[0].limits
    load = str(outcomes[0].row["load"])
    shown = load if len(load) <= 90 else load[:87] + "..."
    seeds = len({outcome.cell.seed for outcome in outcomes})
    return "   ·   ".join(
        (
            shown,
            f"{cell.slots} slots",
            f"{limits.num_pages:,} pages of {limits.page_size} tokens",
            f"{seeds} seed{'s' if seeds > 1 else ''}",
        )
    )


def completion(outcomes: list[Outcome], path: Path) -> Path:
    """The share of all requests over within a time; the unfinished never are."""
    loads = rhos(outcomes)
    columns = 2 if len(loads) == 4 else min(_COLUMNS, len(loads))
    rows = -(-len(loads) // columns)
    figure, axes = panels(
        "How long requests take",
        under(outcomes),
        rows,
        columns,
        width=7.2 if columns == 1 else 4.6,
        height=4.2 if columns == 1 else 3.4,
        sharey=True,
        sharex=True,
    )
    for i, (one, rho) in enumerate(zip(axes, loads, strict=False)):
        for name, look in looks(policies(outcomes)).items():
            jct_s = np.concatenate([o.jct_s for o in _of(outcomes, name, rho)])
            _share_within(one, jct_s, name, look.color, look.dashes)
        heading(one, _load_name(rho))
        if i >= len(loads) - columns:
            one.set_xlabel("time from arrival to last token (s)")
            one.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            one.set_ylabel("requests completed (%)")
        one.set_ylim(0, 101)
    for spare in axes[len(loads) :]:
        spare.set_visible(False)
    seconds_axis(axes[0], "x")
    shared_legend(figure, axes[0])
    return save(figure, path)


def slo(outcomes: list[Outcome], path: Path) -> Path:
    """Which share is served within so many seconds a token; and how that ends as load grows."""
    loads = rhos(outcomes)
    several = [rho for rho in loads if rho is not None]
    columns = 2 if len(several) > 1 else 1
    figure, axes = panels(
        "How long a token takes, waiting included",
        under(outcomes),
        1,
        columns,
        width=7.2 if columns == 1 else 6.2,
        height=4.2,
    )
    for name, look in looks(policies(outcomes)).items():
        of = _of(outcomes, name, loads[-1])
        per_token_s = np.concatenate([o.jct_s / o.output_tokens for o in of])
        _share_within(axes[0], per_token_s, name, look.color, look.dashes)
    heading(axes[0], _load_name(loads[-1]))
    seconds_axis(axes[0], "x")
    axes[0].set(xlabel="time from arrival to last token, per output token (s)", ylim=(0, 101))
    axes[0].set_ylabel("requests within that (%)")
    axes[0].axvline(SLO_S, color=BOUND, linewidth=1.2)
    axes[0].text(SLO_S, 3, f" {SLO_S:g} s/token", color=BOUND, fontsize=8.5, ha="left", va="bottom")
    shared_legend(figure, axes[0])
    if columns == 2:
        _latency_by_load(axes[1], outcomes, several)
    return save(figure, path)


def by_length(outcomes: list[Outcome], path: Path) -> Path:
    """Mean completion time of each tenth of the requests, short outputs first."""
    rho = rhos(outcomes)[-1]
    figure, axes = panels(
        "Who waits: completion time by length of the output",
        f"{under(outcomes)}   ·   {_load_name(rho)}",
        1,
        1,
        width=7.2,
        height=4.2,
    )
    ticks: list[str] = []
    for name, look in looks(policies(outcomes)).items():
        of = _of(outcomes, name, rho)
        tenths = by_decile(
            np.concatenate([o.output_tokens for o in of]), np.concatenate([o.jct_s for o in of])
        )
        places = np.arange(1, len(tenths) + 1)
        means_s = [tenth.jct_mean_s for tenth in tenths]
        axes[0].plot(
            places,
            means_s,
            color=look.color,
            linestyle=look.dashes,
            marker="o",
            markersize=4.5,
            linewidth=1.8,
            label=name,
        )
        ticks = [f"≤ {tenth.most_tokens:,}" for tenth in tenths]
    seconds_axis(axes[0], "y")
    axes[0].set_xticks(range(1, len(ticks) + 1), ticks)
    axes[0].set_xlabel("output tokens, in tenths of the requests")
    axes[0].set_ylabel("mean time from arrival to last token (s)")
    shared_legend(figure, axes[0])
    return save(figure, path)


def _latency_by_load(axes: Axes, outcomes: list[Outcome], loads: list[float]) -> None:
    held_names = []
    for name, look in looks(policies(outcomes)).items():
        points = [
            (r, average(outcomes, name, r, "normalized_latency_mean_s")) for r in sorted(loads)
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=look.color,
            linestyle=look.dashes,
            marker="o",
            markersize=4.5,
            linewidth=1.8,
            label=name,
        )
        held = slo_throughput(points)
        if held is not None and held.sign == "=":
            axes.plot(held.rho, SLO_S, marker="D", color=look.color, markersize=6.5, zorder=4)
            held_names.append(f"{name} {held.rho:.2f}")
    axes.axhline(SLO_S, color=BOUND, linewidth=1.2)
    axes.axvline(1.0, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.text(min(loads), SLO_S, f"{SLO_S:g} s/token", color=BOUND, fontsize=8.5, va="bottom")
    seconds_axis(axes, "y")
    axes.set_xlabel("load: arrivals over what FCFS can complete (rho)")
    axes.set_ylabel("mean time per output token (s)")
    said = (
        f"the bound is crossed at: {', '.join(held_names)}"
        if held_names
        else "the bound is never crossed"
    )
    heading(axes, said if len(said) < 70 else "the bound is crossed at the diamonds")


def _share_within(axes: Axes, values: FloatArray, name: str, color: str, dashes: object) -> None:
    """Steps up by one request at each finite value; NaN counts as never."""
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        axes.plot([], [], color=color, label=f"{name} (none)")
        return
    chosen = np.unique(np.linspace(0, len(known) - 1, _CURVE_POINTS).astype(int))
    share = 100.0 * (chosen + 1) / len(values)
    axes.plot(known[chosen], share, color=color, linestyle=dashes, linewidth=1.8, label=name)


def _of(outcomes: list[Outcome], name: str, rho: float | None) -> list[Outcome]:
    return [o for o in outcomes if o.row["policy"] == name and o.cell.rho == rho]


def _load_name(rho: float | None) -> str:
    return "arrivals as they were recorded" if rho is None else f"load {rho:g}"
