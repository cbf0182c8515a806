"""How losses fell, as a picture beside a run's numbers."""

from __future__ import annotations

from pathlib import Path

from .train import points

PICTURE = "curves.png"


def draw(folder: Path, what: str) -> Path | None:
    """`what` has the loss: a token, or a text. None where the extra `pictures` is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    every = list(points(folder))
    measured = [point for point in every if point.valid_loss is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot([p.step for p in every], [p.loss for p in every], label="trained on", linewidth=1)
    if measured:
        valid = [p.valid_loss for p in measured]
        loss.plot([p.step for p in measured], valid, "o-", label="held out", markersize=3)
    loss.set_ylabel(f"nats per {what}")
    loss.legend()
    rate.plot([p.step for p in every], [p.learning_rate for p in every], color="grey", linewidth=1)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path
