"""One `fastserve simulate`: its options checked and spread into cells, run, and shown.

Knows how the parts of this room meet; decides nothing about scheduling.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ..core.routing import POLICIES as ROUTERS
from ..errors import ConfigError
from . import report
from .devices import read_device
from .options import Study
from .pool import cores, run_cells
from .run import Cell, Outcome, Source, parse_policy, prepare

_TRACE_N = 2000  # requests of a trace, where nobody says


def cells(study: Study) -> list[Cell]:
    """Every policy at every rho with every seed. Raises ConfigError."""
    _check(study)
    names = list(dict.fromkeys(parse_policy(part).written for part in _parts(study.policy)))
    if not names:
        raise ConfigError("--policy is empty: name one, or leave it out")
    loads = [None] if study.rho is None else [_rho(text) for text in _parts(study.rho)]
    if not loads:
        raise ConfigError("--rho is empty: give a load, as in --rho 0.9")
    n = study.n or (None if study.trace is None else _TRACE_N)
    device = read_device(study.device, study.page_size)
    return [
        Cell(
            source=Source(study.load, study.trace, n),
            policy=name,
            device=device,
            slots=study.slots,
            rho=rho,
            seed=seed,
            pages=study.pages,
            host_pages=study.host_pages,
            step_tokens=study.step_tokens,
            page_size=study.page_size,
            until_s=math.inf if study.until is None else study.until,
            timeline=study.pictures is not None and seed == 0 and rho == loads[-1],
            replicas=study.replicas,
            router=study.router if study.replicas > 1 else "",
        )
        for rho in dict.fromkeys(loads)
        for name in names
        for seed in range(study.seeds)
    ]


def _check(study: Study) -> None:
    if (study.trace is None) == (study.load is None):
        given = "neither is there" if study.trace is None else "both are there"
        raise ConfigError(
            f"requests come from --trace FILE or from --load SPEC, and {given}: give one, for "
            "example --load 'gamma:cv=2,n=2000' --rho 0.9"
        )
    least = {
        "--seeds": (study.seeds, 1),
        "--replicas": (study.replicas, 1),
        "--n": (study.n, 1),
        "--slots": (study.slots, 1),
        "--pages": (study.pages, 1),
        "--host-pages": (study.host_pages, 0),
        "--step-tokens": (study.step_tokens, 1),
        "--page-size": (study.page_size, 1),
        "--jobs": (study.jobs, 1),
    }
    for name, (value, bound) in least.items():
        if value is not None and value < bound:
            raise ConfigError(f"{name} is {value}, it must be at least {bound}")
    if study.router not in ROUTERS:
        raise ConfigError(f"no router {study.router!r}: choose among {', '.join(ROUTERS)}")
    if study.replicas > 1 and (study.until is not None or study.pictures is not None):
        raise ConfigError("--until and --pictures are of one replica")
    if study.until is not None and not study.until > 0:
        raise ConfigError(f"--until is {study.until}, it must be above 0 seconds")


def run_study(study: Study) -> list[Outcome]:
    """Run it with a bar, print the table, write what was asked for."""
    all_cells = cells(study)
    # What can be wrong shows before minutes of work, and in this process.
    prepare(all_cells[0])
    if study.json is not None and not study.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {study.json}: there is no folder {study.json.parent}")
    if study.pictures is not None:
        from .canvas import prepare_folder

        prepare_folder(study.pictures)
    with report.bar() as tell:
        outcomes = run_cells(all_cells, study.jobs or cores(), tell)
    report.show(outcomes)
    if study.json is not None:
        _write(study.json, outcomes)
    if study.pictures is not None:
        from .pictures import draw

        for path in draw(outcomes, study.pictures):
            report.console.print(f"drew {path}", markup=False)
    return outcomes


def _write(path: Path, outcomes: list[Outcome]) -> None:
    rows = msgspec.json.encode([outcome.row for outcome in outcomes])
    try:
        path.write_bytes(msgspec.json.format(rows, indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rho(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 100:
        raise ConfigError(f"--rho {text}: loads are numbers above 0, as in --rho 0.7,0.95,1.1")
    return value
