"""How our pictures look: colours, lines, titles and grids, the same in all of them.

Knows matplotlib, which is loaded only when something is drawn; nothing of what is shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by colour-blind people too; without the yellow, too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Policies beyond the colours, or lines that lie on each other, differ by dashes as well.
_DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (3, 1.2)), (0, (1, 1)), (0, (6, 1, 1, 1)))
INK, FAINT, BOUND = "#222222", "#8a8a8a", "#B00020"
DEVICE, CACHED, HOST = "#0072B2", "#9CCBE8", "#E69F00"
WAITING = "#D9D9D9"


class Look(NamedTuple):
    color: str
    dashes: Any


def prepare_folder(folder: Path) -> None:
    """Make it, before anything takes time. Raises ConfigError where pictures cannot be."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--pictures needs matplotlib: pip install 'fastserve-jax[pictures]', or leave it out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--pictures {folder}: {error.strerror}") from error


def looks(names: Sequence[str]) -> dict[str, Look]:
    """One for each policy, the same in every picture of a study."""
    return {
        name: Look(PALETTE[i % len(PALETTE)], _DASHES[i % len(_DASHES)])
        for i, name in enumerate(names)
    }


def shades(count: int) -> list[str]:
    """Light to dark, for levels that have an order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["viridis"]
    return [to_hex(scale(0.95 - 0.85 * i / max(1, count - 1))) for i in range(count)]


def panels(
    title: str, under: str, rows: int, columns: int, *, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` panels of so many inches each, row by row."""
    from matplotlib.figure import Figure

    size = (width * columns, height * rows + 0.75)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    # Room for two lines above the panels.
    top = 1 - 0.62 / size[1]
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.006, 0.01, 0.988, top - 0.01), w_pad=0.08, h_pad=0.06)
    figure.text(0.012, 1 - 0.12 / size[1], title, fontsize=14, weight="bold", va="top", color=INK)
    figure.text(0.012, 1 - 0.40 / size[1], under, fontsize=9, va="top", color=FAINT)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    axes: list[Axes] = list(grid.flat)
    for one in axes:
        dress(one)
    return figure, axes


def dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, which="both")
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=9.5, color=INK)


def heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=8)


def shared_legend(figure: Figure, axes: Axes) -> None:
    """One for all panels, below them, where it hides no line."""
    lines, names = axes.get_legend_handles_labels()
    columns = min(len(names), max(3, int(figure.get_figwidth() / 1.7)))
    place: Any = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.8}
    figure.legend(lines, names, frameon=False, fontsize=9, labelcolor=INK, **place)


def seconds_axis(axes: Axes, which: str) -> None:
    """The x or y axis logarithmic, with plain numbers; after everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    data = axes.dataLim
    if not np.isfinite(data.minposx if which == "x" else data.minposy):
        return  # nothing to show
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 120 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--pictures {path}: {error.strerror}") from error
    return path
