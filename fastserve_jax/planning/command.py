"""`fastserve plan`: from a model's name and a chip's to what is printed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fastserve_jax.chips import ENVIRONMENT, chips
from fastserve_jax.config import Settings

_SETTINGS = Path(__file__).parents[1] / "configs" / "serve"


def run_plan(
    reference: str,
    chip: str,
    settings: Callable[[Path | None], Settings],
    cache_dir: Path,
    as_json: bool,
) -> None:
    """`settings` are read over those of the chip's family, given as a file."""
    os.environ.update(ENVIRONMENT)  # before jax is imported
    found = chips(chip)
    from fastserve_jax.terminal import Bars
    from fastserve_jax.weights.load import open_config
    from pallas_kernels import compiling_for

    from . import plan, report, site

    chosen = settings(_SETTINGS / f"{found.kind}.toml")
    with Bars() as bars:
        name, config = open_config(reference, cache_dir, bars.pull)
    said = Console(stderr=True)
    with compiling_for(found.target), said.status("") as status:
        there = site.make_site(name, config, chosen, chip, found)
        planned = plan.plan(there, status.update)
    if as_json:
        print(report.as_json(planned))
    else:
        report.show(planned, found.rates, Console())
