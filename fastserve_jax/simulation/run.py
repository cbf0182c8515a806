"""One cell of a study: requests, a policy and a device in, one row out; and the FCFS capacity that
says what a load is worth. The production scheduler runs in core.simulate's virtual time.

Knows nothing of processes, tables, files to write or pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from ..core.cost import CostModel
from ..core.mlfq import SkipJoinMLFQ
from ..core.policy import POLICIES, Lengths, Policy, make_policy
from ..core.routing import Router
from ..core.scheduler import Limits, Scheduler
from ..core.simulate import Run, Sample, simulate
from ..core.simulate_replicas import Routing, simulate_replicas
from ..errors import ConfigError
from .load import parse_load
from .measures import Row, completion_s, first_token_delay_s, routed, row
from .traces import read_trace
from .workload import BLOCK_TOKENS, FloatArray, IntArray, Workload

DEFAULT_SIGMA = 0.6  # of a predictor's error, in logarithm
DEFAULT_STEP_TOKENS = 512
_TIMELINE_SAMPLES = 400
_ENOUGH = 2000  # requests, to say what one replica completes
_TRUE_LENGTHS = ("sjf-oracle", "srpt-oracle")
# What may stand behind a policy's name: a predictor's error, or the seconds until starvation.
_OPTIONS = {
    "srpt-predicted": "sigma",
    "adaptive": "sigma",
    "mlfq": "starve",
    "mlfq-naive": "starve",
}
_MOST = {"sigma": 5.0, "starve": 1e9}

Tell = Callable[[float], None]  # hears which share of a run is over


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from: a generated load or a trace."""

    spec: str | None = None
    trace: Path | None = None
    n: int | None = None  # the first so many; None: all

    def workload(self, seed: int) -> Workload:
        if self.trace is not None:
            return read_trace(self.trace, seed, self.n)
        assert self.spec is not None
        drawn = parse_load(self.spec).workload(seed)
        return drawn if self.n is None else drawn.first(self.n)


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A policy as written: its name and its option."""

    written: str
    name: str
    sigma: float | None = None  # a predictor's error; None: it is told no lengths, or true ones
    starve_s: float | None = None  # None: as the policy has it

    def make(self, limits: Limits, cost: CostModel, workload: Workload, seed: int) -> Policy:
        if self.starve_s is not None:
            skip_join = self.name == "mlfq"
            return SkipJoinMLFQ(limits, cost, starve_s=self.starve_s, skip_join=skip_join)
        return make_policy(self.name, limits, cost, self.lengths(workload, seed))

    def lengths(self, workload: Workload, seed: int) -> Lengths | None:
        """The true output lengths, predicted ones, or none. One seed errs alike for all."""
        told: list[float] = workload.output_tokens.tolist()
        if self.sigma is not None:
            noise = np.random.default_rng([seed, 3]).standard_normal(len(workload))
            told = (workload.output_tokens * np.exp(self.sigma * noise)).tolist()
        elif self.name not in _TRUE_LENGTHS:
            return None
        return told.__getitem__


def parse_policy(text: str) -> PolicyChoice:
    """`name`, `name:sigma=S` or `name:starve=S`. Raises ConfigError listing what there is."""
    name, colon, option = text.strip().partition(":")
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}: choose among {', '.join(POLICIES)}")
    if not colon:
        return PolicyChoice(name, name, DEFAULT_SIGMA if name == "srpt-predicted" else None)
    key, _, given = option.partition("=")
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if _OPTIONS.get(name) != key or not 0 <= value <= _MOST[key]:
        raise ConfigError(
            f"policy {text.strip()!r}: the only options are a predictor's error, 0 to 5, as in "
            "srpt-predicted:sigma=0.6 and adaptive:sigma=0.6, and the seconds after which who "
            "waits is promoted, as in mlfq:starve=3 and mlfq-naive:starve=3"
        )
    written = f"{name}:{option}"
    if key == "sigma":
        return PolicyChoice(written, name, sigma=value)
    return PolicyChoice(written, name, starve_s=value)


@dataclass(frozen=True, slots=True)
class Cell:
    """All that decides one run."""

    source: Source
    policy: str
    device: CostModel
    slots: int = 16
    rho: float | None = None  # None: arrivals stay as they are
    seed: int = 0
    pages: int | None = None  # None: as many as FCFS can use
    host_pages: int | None = None  # None: four times the device's
    step_tokens: int | None = None  # None: 512, or one for each slot where those are more
    page_size: int = 16
    until_s: float = math.inf
    timeline: bool = False  # keep samples of the scheduler
    replicas: int = 1
    router: str = ""  # where there are several

    @property
    def ground(self) -> str:
        """Equal for cells that share one capacity."""
        plain = {"policy": "", "rho": None, "timeline": False, "until_s": 0.0, "router": ""}
        return repr(replace(self, **plain))  # type: ignore[arg-type]


@dataclass(slots=True)
class Outcome:
    """What a cell came to. Arrays are by request id."""

    cell: Cell
    row: Row
    dropped: int  # rows of the trace without output
    left_out: int  # requests larger than the pool
    capacity: float | None  # requests a second
    jct_s: FloatArray  # NaN: unfinished
    ttft_delay_s: FloatArray  # to the first token, less the prompt's own time; NaN: none came
    output_tokens: IntArray
    offered_tokens_per_s: float  # until the last arrival: without the device running empty
    arrival_s: FloatArray
    limits: Limits
    samples: list[Sample] = field(default_factory=list)


def _silent(share: float) -> None:
    pass


def prepare(cell: Cell) -> tuple[Workload, Limits, int]:
    """The requests that fit, the limits they run under, and how many were left out.

    A request that could never fit the pool is left out for every policy alike.
    """
    whole = cell.source.workload(cell.seed)
    if min(cell.slots, cell.page_size) < 1 or (cell.pages is not None and cell.pages < 1):
        raise ConfigError("--slots, --pages and --page-size must be at least 1")
    if cell.rho is None and not whole.timed:
        raise ConfigError(
            f"{whole.name}: nothing says how fast requests arrive: give --rho 0.9"
            + ("" if cell.source.spec is None else ", or rate= in the load")
        )
    needed = -(-(whole.prompt_tokens + whole.output_tokens) // cell.page_size)
    pages = cell.pages
    if pages is None:
        # A page to grow into for each, so that FCFS never waits for one; never more than all need.
        pages = int(min(cell.slots * (needed.max() + 1), needed.sum() + len(whole)))
    fits = needed <= pages
    if not fits.any():
        raise ConfigError(
            f"{whole.name}: the smallest request needs {needed.min():,} pages of {cell.page_size} "
            f"tokens and there are {pages:,}: raise --pages"
        )
    workload = whole.kept(fits)
    limits = Limits(
        page_size=cell.page_size,
        num_pages=pages,
        host_pages=4 * pages if cell.host_pages is None else cell.host_pages,
        max_slots=cell.slots,
        step_tokens=cell.step_tokens or max(DEFAULT_STEP_TOKENS, cell.slots),
        max_context=workload.most_tokens(pages * cell.page_size),
        max_queue=len(workload) + 1,
        max_live=len(workload) + cell.slots + 1,
    )
    return workload, limits, len(whole) - len(workload)


def capacity(cell: Cell, tell: Tell = _silent) -> float:
    """Requests a second that FCFS completes when all are there from the start: counted while it
    is busy with full slots, hence without the first and the last fifth of the run."""
    if cell.replicas > 1:  # each completes what one does, of fewer requests
        n = min(cell.source.n or _ENOUGH, _ENOUGH)
        one = replace(cell, replicas=1, source=replace(cell.source, n=n))
        return cell.replicas * capacity(one, tell)
    workload, limits, _ = prepare(cell)
    whole_run = replace(cell, until_s=math.inf)
    run = _simulate(whole_run, parse_policy("fcfs"), workload.at_once(), limits, tell)
    done_s = np.array([life.done_s for life in run.lives if life.done_s >= 0])
    end_s = float(done_s.max())
    counted = int(((done_s >= 0.2 * end_s) & (done_s < 0.8 * end_s)).sum())
    return counted / (0.6 * end_s) if counted else len(done_s) / end_s


def run_cell(cell: Cell, of_capacity: float | None = None, tell: Tell = _silent) -> Outcome:
    """Run it; `of_capacity` is what `rho` is a share of. Raises ConfigError."""
    workload, limits, left_out = prepare(cell)
    choice = parse_policy(cell.policy)
    if cell.rho is not None:
        assert of_capacity is not None
        workload = workload.scaled_to(cell.rho * of_capacity)
    every_s = 0.0
    if cell.timeline:
        shortest_s = len(workload) / of_capacity if of_capacity else 0.0
        every_s = max(float(workload.arrival_s[-1]), shortest_s, 1.0) / _TIMELINE_SAMPLES
    routing = None
    if cell.replicas > 1:
        run, routing = _simulate_replicas(cell, choice, workload, limits, tell)
    else:
        run = _simulate(cell, choice, workload, limits, tell, every_s)
    found = row(
        choice.written,
        workload.name,
        cell.rho,
        cell.slots,
        limits.num_pages,
        cell.seed,
        workload,
        run,
        cell.device,
        limits.step_tokens,
    )
    if routing is not None:
        found |= routed(cell.replicas, cell.router, workload, run, routing)
    jct_s = completion_s(workload, run)
    return Outcome(
        cell,
        found,
        workload.dropped,
        left_out,
        of_capacity,
        jct_s,
        first_token_delay_s(workload, run, cell.device, limits.step_tokens),
        workload.output_tokens,
        run.offered_tokens / run.offered_s if run.offered_s else 0.0,
        workload.arrival_s,
        limits,
        run.samples,
    )


def _simulate(
    cell: Cell,
    choice: PolicyChoice,
    workload: Workload,
    limits: Limits,
    tell: Tell,
    every_s: float = 0.0,
) -> Run:
    # The scheduler corrects its model as it goes, and must not correct the device with it.
    cost = cell.device.copy()
    policy = choice.make(limits, cost, workload, cell.seed)
    return simulate(
        Scheduler(limits, policy, cost),
        workload.arrivals(limits.num_pages * limits.page_size),
        workload.lengths(),
        cell.device,
        timer=time.perf_counter,
        sample_every_s=every_s,
        until_s=cell.until_s,
        progress=lambda finished: tell(finished / len(workload)),
    )


def _simulate_replicas(
    cell: Cell, choice: PolicyChoice, workload: Workload, limits: Limits, tell: Tell
) -> tuple[Run, Routing]:
    def scheduler() -> Scheduler:
        cost = cell.device.copy()
        return Scheduler(limits, choice.make(limits, cost, workload, cell.seed), cost)

    blocks = workload.blocks
    return simulate_replicas(
        [scheduler() for _ in range(cell.replicas)],
        Router(cell.router, Random(cell.seed).sample),
        workload.arrivals(limits.num_pages * limits.page_size),
        workload.lengths(),
        cell.device,
        expected_tokens=float(workload.output_tokens.mean()),
        beginnings=(lambda _: ()) if blocks is None else blocks.__getitem__,
        block_tokens=BLOCK_TOKENS,
        timer=time.perf_counter,
        progress=lambda finished: tell(finished / len(workload)),
    )
