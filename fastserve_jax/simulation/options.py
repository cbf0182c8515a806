"""What can be asked of `fastserve simulate`, with its defaults. Stdlib only: the command line reads
it at every start. Checks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Options as they are typed; None takes what is said here.

    Attributes
    ----------
    trace
        A file of recorded requests: CSV with a header (Azure, ServeGen, BurstGPT), JSON lines
        (Mooncake), or .npy with two columns of lengths.
    load
        Generated requests instead: poisson:n=2000,rate=0.5 or gamma:cv=4,n=2000 and then, where
        wanted, ;in=LENGTHS;out=LENGTHS. Lengths are lognormal:MEDIAN:SIGMA (in: 80:1.2, out:
        200:1.1), pareto:ALPHA:MINIMUM, bimodal:SHORT:LONG:SHARE_OF_LONG, fixed:TOKENS or
        uniform:LOW:HIGH, with :CAP behind where wanted; lognormal and pareto are cut at 2048 in
        and 1024 out otherwise.
    policy
        Separated by commas; the others are compared with the first. srpt-predicted and adaptive
        take a predictor's error, as in adaptive:sigma=0.6; mlfq and mlfq-naive the seconds after
        which who waits is promoted, as in mlfq:starve=3.
    rho
        Loads, separated by commas, as shares of what FCFS completes with the same device, slots
        and pages; arrivals are stretched to them. Without it they stay as they are.
    seeds
        Runs to average over: other requests of a generated load, other windows of a trace.
    replicas
        Servers behind one router; --rho is then a share of what all complete.
    router
        prefix, least or round-robin: who a request goes to, among several replicas.
    slots
        Requests that run together in one step.
    pages
        KV pages on the device; as many as FCFS can use otherwise.
    host_pages
        KV pages in host memory; four times the device's otherwise, 0 for none.
    step_tokens
        Tokens of one step, decodes and prompts together; 512 otherwise, or one for each slot.
    page_size
        Tokens of a page.
    device
        a100-opt13b, h100-llama3-8b, or a JSON file with what steps take.
    n
        The first requests of each window or load; 2000 of a trace otherwise.
    until
        Seconds of virtual time after which a run is cut off; what is unfinished then is counted.
    jobs
        Processes; one for each core otherwise.
    json
        A file for a list with one object for each run.
    pictures
        A folder for PNGs (needs matplotlib, the extra `pictures`).
    """

    trace: Path | None = None
    load: str | None = None
    policy: str = "fcfs,mlfq,adaptive"
    rho: str | None = None
    seeds: int = 1
    replicas: int = 1
    router: str = "prefix"
    slots: int = 16
    pages: int | None = None
    host_pages: int | None = None
    step_tokens: int | None = None
    page_size: int = 16
    device: str = "a100-opt13b"
    n: int | None = None
    until: float | None = None
    jobs: int | None = None
    json: Path | None = None
    pictures: Path | None = None
