"""What a run was like for those who asked, in numbers: one flat row, and a few curves.

Knows lives and cost models; runs nothing and prints nothing. No request is left out as warm-up:
that would hide those who starve. Unfinished ones have no completion time and are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.cost import CostModel, StepLoad
from ..core.simulate import Run
from ..core.simulate_replicas import Routing
from .workload import FloatArray, IntArray, Workload

SLO_S = 0.3  # seconds per output token, all waiting included: FastServe's bound

Value = str | int | float | None
Row = dict[str, Value]


def row(
    policy: str,
    load: str,
    rho: float | None,
    slots: int,
    pages: int,
    seed: int,
    workload: Workload,
    run: Run,
    device: CostModel,
    chunk: int,
) -> Row:
    """One run. JCT is from arrival to the last token; TTFT to the first. Slowdown is JCT over
    what the request would take alone on `device`, its prompt in chunks of `chunk`; normalised
    latency is JCT per output token. None where nobody finished, hence nothing is known."""
    jct_s, ttft_s = completion_s(workload, run), first_token_s(run)
    done = np.isfinite(jct_s)
    finished_s, outputs = jct_s[done], workload.output_tokens[done]
    alone = alone_s(workload, device, chunk)[done]
    produced = sum(life.produced for life in run.lives)
    moved = run.stats.pages_out + run.stats.pages_in
    return {
        "policy": policy,
        "load": load,
        "rho": rho,
        "slots": slots,
        "pages": pages,
        "seed": seed,
        "requests": len(workload),
        "unfinished": int(len(workload) - done.sum()),
        "jct_mean_s": _mean(finished_s),
        "jct_p50_s": _percentile(finished_s, 50),
        "jct_p95_s": _percentile(finished_s, 95),
        "jct_p99_s": _percentile(finished_s, 99),
        "ttft_mean_s": _mean(ttft_s),
        "ttft_p99_s": _percentile(ttft_s, 99),
        "stall_max_s": max((life.longest_gap_s for life in run.lives), default=0.0),
        "slowdown_mean": _mean(finished_s / alone),
        "normalized_latency_mean_s": _mean(finished_s / outputs),
        "tokens_per_s": _ratio(produced, run.end_s),
        "swap_stall_fraction": _ratio(run.stall_s, run.busy_s),
        "swap_bytes_per_token": _ratio(device.page_bytes * moved, produced),
        "preemptions_per_request": _ratio(run.stats.preemptions, len(workload)),
        "plan_commit_us": _ratio(run.plan_commit_s * 1e6, run.steps),
    }


def routed(replicas: int, router: str, workload: Workload, run: Run, routing: Routing) -> Row:
    """What is added of several replicas: how evenly they were busy, what of prompts was cached, and
    when the router or a scheduler, on a core like this one, would be the bound.

    router_most_per_s is how many requests a second one router decides; scheduler_share what of the
    steps' time one replica's planning takes: at 1 its device would wait for it.
    """
    route_s = _ratio(routing.route_s, routing.decisions)
    span_s = run.offered_s or run.end_s
    sent = [routing.sent.get(str(number), 0) for number in range(replicas)]
    return {
        "replicas": replicas,
        "router": router,
        "route_us": route_s * 1e6,
        "router_most_per_s": _ratio(1.0, route_s),
        "router_share": _ratio(route_s * len(workload), span_s),
        "scheduler_share": _ratio(run.plan_commit_s, run.busy_s),
        "busy_share": _ratio(run.busy_s, replicas * run.end_s),
        "most_sent_over_mean": _ratio(max(sent) * replicas, sum(sent)),
        "cached_share": _ratio(run.stats.prefix_hit_tokens, run.stats.prefix_query_tokens),
    }


def completion_s(workload: Workload, run: Run) -> FloatArray:
    """From arrival to the last token, by request id; NaN for the unfinished."""
    taken_s = np.full(len(workload), np.nan)
    for life in run.lives:
        if life.done_s >= 0:
            taken_s[life.request_id] = life.done_s - life.arrival_s
    return taken_s


def first_token_s(run: Run) -> FloatArray:
    """From arrival to the first token, of those that have one."""
    return np.array([v.first_token_s - v.arrival_s for v in run.lives if v.first_token_s >= 0])


def first_token_delay_s(workload: Workload, run: Run, device: CostModel, chunk: int) -> FloatArray:
    """From arrival to the first token, less what the prompt takes alone, by request id."""
    delay_s = np.full(len(workload), np.nan)
    for life in run.lives:
        if life.first_token_s >= 0:
            own_s = device.prefill_s(life.prompt_tokens, chunk)
            delay_s[life.request_id] = life.first_token_s - life.arrival_s - own_s
    return delay_s


def alone_s(workload: Workload, device: CostModel, chunk: int) -> FloatArray:
    """What each request would take with the device to itself, nothing of it in the cache."""
    prompts, outputs = workload.prompt_tokens, workload.output_tokens
    lengths, place = np.unique(prompts, return_inverse=True)
    prefill_s = np.array([device.prefill_s(length, chunk) for length in lengths.tolist()])
    steps = outputs - 1  # the prompt's last step brings the first token
    # The steps read prompt + 1, prompt + 2, ... prompt + steps keys.
    kv_tokens = steps * prompts + steps * (steps + 1) / 2
    one_s = device.compute_s(StepLoad(decode_rows=1))
    alone: FloatArray = prefill_s[place] + steps * one_s + device.kv_token_s * kv_tokens
    return alone


class Decile(NamedTuple):
    """A tenth of the requests, by how much output they wanted."""

    most_tokens: int  # the longest of them
    jct_mean_s: float  # NaN where none finished
    unfinished: int


def by_decile(output_tokens: IntArray, jct_s: FloatArray) -> list[Decile]:
    """The short ones' tenth first; ties by id. Shows whom a policy lets wait."""
    parts = np.array_split(np.argsort(output_tokens, kind="stable"), 10)
    found = []
    for part in parts:
        if len(part):
            done = jct_s[part][np.isfinite(jct_s[part])]
            mean_s = float(done.mean()) if len(done) else float("nan")
            found.append(Decile(int(output_tokens[part[-1]]), mean_s, len(part) - len(done)))
    return found


class Held(NamedTuple):
    """Up to which rho a bound was held."""

    rho: float
    sign: str  # "=": crossed there; ">": held wherever it was run; "<": nowhere


def slo_throughput(points: Iterable[tuple[float, float]], slo_s: float = SLO_S) -> Held | None:
    """Where mean normalised latency first crosses `slo_s`, of points (rho, seconds per token).

    Latency grows with load, and what says otherwise is noise: the curve is first made monotone by
    least squares. A single lucky point beyond a crossing therefore moves nothing much.
    """
    known = sorted((rho, value) for rho, value in points if np.isfinite(value))
    if not known:
        return None
    rhos, values = [rho for rho, _ in known], _monotone([value for _, value in known])
    if values[0] > slo_s:
        return Held(rhos[0], "<")
    for i in range(1, len(values)):
        if values[i] > slo_s:
            share = (slo_s - values[i - 1]) / (values[i] - values[i - 1])
            return Held(rhos[i - 1] + share * (rhos[i] - rhos[i - 1]), "=")
    return Held(rhos[-1], ">")


def _monotone(values: Sequence[float]) -> list[float]:
    """The nearest ascending values: neighbours that descend are pooled into their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean = (mean * count + before * members) / (count + members)
            count += members
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _mean(values: FloatArray) -> float | None:
    return float(values.mean()) if len(values) else None


def _percentile(values: FloatArray, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
