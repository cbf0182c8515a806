"""A scaled trace against a running server with a real model, policy by policy, and what the
simulation says of the same requests.

    python bench/policies.py [--model smollm2-135m-instruct] [--rounds 2] [--policies fcfs,mlfq,...]

One process serves over HTTP, one policy at a time; this one sends the requests at their times. In
each round every policy gets the same requests, and the order changes from round to round. Output
lengths are the trace's: the end-of-text token is forbidden before and forced at that length, which
the scheduler does not see; nothing is guessed ahead, as in virtual time. Before the rounds all
requests are sent at once under fcfs: that gives the rate at which it completes them, hence rho.

Afterwards the production scheduler plays the same requests in virtual time: on a cost model fitted
to the steps of that first turn ("foretold"), and for each turn on one fitted to its own steps
("simulated"). Near rho 1 a machine that is 10% slower than before doubles what requests take, so
only the second says whether the simulation is right. Exit status 1 when a figure misses what is
asked.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import multiprocessing
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fastserve_jax.assemble import load
from fastserve_jax.cli import cache_folder
from fastserve_jax.client import AsyncClient
from fastserve_jax.config import load_settings
from fastserve_jax.core.cost import CostModel, StepLoad, fit
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.simulate import STOP, simulate
from fastserve_jax.core.types import Request, Sampling
from fastserve_jax.metrics import Metrics
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.lifecycle import listening
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState
from fastserve_jax.simulation.run import Source

TRACE = Path(__file__).parents[2] / "shared" / "traces" / "servegen_m_large_1h_5rps.csv"
LOAD = "poisson:n=2000;in=lognormal:200:1.0;out=bimodal:100:1200:0.1"
FASTER, THROUGHPUT, AGREEMENT = 0.75, 0.97, 0.15  # what is asked
END = 2  # SmolLM2's <|im_end|>; any token will do, for it is forced


@dataclass(frozen=True)
class Ask:
    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Told:
    """What the server says when a policy's turn is over."""

    cost: CostModel  # as fitted to the steps of this turn
    error: float  # of the scheduler's own
    preemptions: int
    pages_out: int
    pages_in: int
    recomputed_tokens: int
    stall_share: float


def serve(pipe: Connection, model: str, sets: list[str]) -> None:
    loaded = load(model, load_settings(None, sets), cache_folder())

    async def one(policy: str) -> Told:
        metrics = Metrics(loaded.name)
        state = ServerState(ServerConfig(port=0), metrics)
        scheduler = loaded.scheduler(policy)
        steps: list[tuple[StepLoad, float]] = []
        engine = loaded.engine(
            lambda step: steps.append((step.load, step.elapsed_s)), scheduler=scheduler
        )
        async with engine, listening(state) as url:
            context = loaded.limits.max_context
            state.put(Served(loaded.name, engine, loaded.tokenizer, context, loaded.template))
            state.ready()
            pipe.send(url)
            await asyncio.to_thread(pipe.recv)
            stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0), stats
        return Told(
            explained(steps, loaded.cost),
            stats.cost_error,
            *(stats.preemptions, stats.pages_out, stats.pages_in, stats.recomputed_tokens),
            stats.stall_s / stats.busy_s,
        )

    with loaded.runner:
        pipe.send((loaded.limits, loaded.cost))
        while (policy := pipe.recv()) is not None:
            pipe.send(asyncio.run(one(policy)))


def explained(steps: list[tuple[StepLoad, float]], known: CostModel) -> CostModel:
    """The model that explains what each of `steps` took, and, scaled, what all took together: a
    queue is as long as the mean makes it, pauses of the machine included."""
    still = [(load, elapsed_s) for load, elapsed_s in steps if not load.pages_moved]
    cost = fit(still, known.buckets)
    scale = sum(elapsed_s for _, elapsed_s in still) / sum(cost.step_s(load) for load, _ in still)
    return dataclasses.replace(
        cost,
        base_s=[scale * base_s for base_s in cost.base_s],
        prefill_token_s=scale * cost.prefill_token_s,
        decode_row_s=scale * cost.decode_row_s,
        kv_token_s=scale * cost.kv_token_s,
        page_out_s=known.page_out_s,
        page_in_s=known.page_in_s,
    )


async def replay(url: str, asks: list[Ask]) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds to the last and to the first token of each, and tokens/s from first to last."""
    async with AsyncClient(url, timeout_s=3600) as client:

        async def one(ask: Ask) -> tuple[float, float]:
            await asyncio.sleep(max(0.0, began + ask.arrival_s - time.perf_counter()))
            due, first = began + ask.arrival_s, math.nan
            fields = {
                "temperature": 0,
                "min_tokens": ask.output_tokens - 1,
                "stop_token_ids": [END],
            }
            async with client.stream_complete(
                prompt=list(ask.prompt), max_tokens=most, logit_bias={str(END): 100}, **fields
            ) as stream:
                async for chunk in stream:
                    if math.isnan(first) and chunk.choices:
                        first = time.perf_counter() - due
            return time.perf_counter() - due, first

        most = max(ask.output_tokens for ask in asks)
        began = time.perf_counter() + 0.2
        taken = np.array(await asyncio.gather(*map(one, asks)))
    end_s = max(ask.arrival_s + jct for ask, jct in zip(asks, taken[:, 0], strict=True))
    return taken[:, 0], taken[:, 1], sum(ask.output_tokens for ask in asks) / end_s


def played_jct_s(asks: list[Ask], policy: str, limits: Limits, cost: CostModel) -> float:
    """Mean seconds to the last token, in virtual time on a device of that cost."""
    most = max(ask.output_tokens for ask in asks)
    requests = [
        (a.arrival_s, Request(i, a.prompt, Sampling(most, stop_ids=frozenset({STOP}))))
        for i, a in enumerate(asks)
    ]
    lengths = {i: a.output_tokens for i, a in enumerate(asks)}
    known = cost.copy()
    scheduler = Scheduler(limits, make_policy(policy, limits, known), known)
    run = simulate(scheduler, requests, lengths, cost)
    return float(np.mean([life.done_s - life.arrival_s for life in run.lives]))


def make_asks(source: Source, scale: float, seed: int, limits: Limits) -> list[Ask]:
    """Lengths times `scale`, prompts of tokens that occur nowhere else, all at once."""
    workload = source.workload(seed)
    chance = np.random.default_rng(seed)
    asks = []
    room = limits.max_context - max(1, round(int(workload.output_tokens.max()) * scale)) - 1
    for given, wanted in zip(workload.prompt_tokens, workload.output_tokens, strict=True):
        output = max(1, round(wanted * scale))
        prompt = chance.integers(1000, 20_000, max(1, min(round(given * scale), room)))
        asks.append(Ask(0.0, tuple(prompt.tolist()), output))
    return asks


def spread(asks: list[Ask], source: Source, seed: int, rate: float) -> list[Ask]:
    """The same, arriving as the source has it, at so many a second."""
    arrival_s = source.workload(seed).scaled_to(rate).arrival_s
    return [
        dataclasses.replace(a, arrival_s=float(t)) for a, t in zip(asks, arrival_s, strict=True)
    ]


def capacity(taken_s: np.ndarray) -> float:
    """Requests a second, of all that were there at once: first and last fifth apart."""
    done_s = np.sort(taken_s)
    low, high = len(done_s) // 5, 4 * len(done_s) // 5
    return (high - low) / (done_s[high] - done_s[low])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--trace", type=Path, default=TRACE if TRACE.exists() else None)
    parser.add_argument("--load", default=LOAD, help="where there is no trace")
    parser.add_argument("--scale", type=float, default=0.2, help="of the lengths")
    parser.add_argument("--n", type=int, default=250)
    parser.add_argument("--rho", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--pages", type=int, default=48, help="a pool small enough for swapping")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", default="fcfs,mlfq,adaptive")
    asked = parser.parse_args()
    policies = asked.policies.split(",")
    sets = [f"engine.max_slots={asked.slots}", "engine.max_context=512", f"kv.pages={asked.pages}"]
    sets += [f"kv.host_pages={8 * asked.pages}", "engine.speculate=off"]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, asked.model, sets))
    server.start()
    limits, _ = here.recv()
    source = Source(trace=asked.trace, n=asked.n)
    if asked.trace is None:
        source = Source(spec=asked.load, n=asked.n)
    asks = make_asks(source, asked.scale, asked.seed, limits)

    def take_turn(policy: str, asks: list[Ask]) -> tuple[np.ndarray, np.ndarray, float, Told]:
        here.send(policy)
        taken_s, first_s, tokens_per_s = asyncio.run(replay(here.recv(), asks))
        here.send("over")
        return taken_s, first_s, tokens_per_s, here.recv()

    taken_s, first_s, tokens_per_s, told = take_turn("fcfs", asks)
    rate, fitted = asked.rho * capacity(taken_s), told.cost
    print(f"all at once {describe(taken_s, first_s, tokens_per_s, told)}\n{fitted}")
    asks = spread(asks, source, asked.seed, rate)
    print(
        f"{asked.model}, {asked.n} requests of {asked.trace.name if asked.trace else asked.load} "
        f"x {asked.scale}, {rate:.2f} a second (rho {asked.rho}), {asked.slots} slots, "
        f"{limits.num_pages} + {limits.host_pages} pages of {limits.page_size}"
    )
    jct: dict[str, list[float]] = {policy: [] for policy in policies}
    rates: dict[str, list[float]] = {policy: [] for policy in policies}
    played_s: dict[str, list[float]] = {policy: [] for policy in policies}
    for turn in range(asked.rounds):
        at = turn % len(policies)
        for policy in (*policies[at:], *policies[:at]):
            taken_s, first_s, tokens_per_s, told = take_turn(policy, asks)
            jct[policy].append(float(taken_s.mean()))
            rates[policy].append(tokens_per_s)
            played_s[policy].append(played_jct_s(asks, policy, limits, told.cost))
            print(
                f"round {turn} {policy:10} {describe(taken_s, first_s, tokens_per_s, told)}; "
                f"simulated {played_s[policy][-1]:.2f} s"
            )
    here.send(None)
    server.join()
    foretold_s = {policy: played_jct_s(asks, policy, limits, fitted) for policy in policies}
    return judge(jct, rates, played_s, foretold_s)


def describe(taken_s: np.ndarray, first_s: np.ndarray, tokens_per_s: float, told: Told) -> str:
    return (
        f"mean JCT {taken_s.mean():6.2f} s, P99 {np.percentile(taken_s, 99):6.2f}, first token P99 "
        f"{np.nanpercentile(first_s, 99):6.2f}, {tokens_per_s:5.1f} tokens/s, {told.preemptions} "
        f"preemptions, {told.pages_out} pages out, {told.pages_in} in, {told.recomputed_tokens} "
        f"computed again, copies {told.stall_share:.1%}, cost model off {told.error:.1%}"
    )


def judge(
    jct: dict[str, list[float]],
    rates: dict[str, list[float]],
    played_s: dict[str, list[float]],
    foretold_s: dict[str, float],
) -> int:
    """Prints medians over rounds; 1 when one of them misses what is asked."""
    missed = False
    base_s, base_foretold_s = float(np.median(jct["fcfs"])), foretold_s["fcfs"]
    print("policy     measured s  /simulated  (each round)  foretold s  /fcfs measured  foretold")
    for policy, taken_s in jct.items():
        ratios = np.array(taken_s) / np.array(played_s[policy])
        found_s, off = float(np.median(taken_s)), float(np.median(ratios))
        missed |= abs(off - 1) > AGREEMENT
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{policy:10}{found_s:11.2f}{off:13.3f}  {each:>12}{foretold_s[policy]:12.2f}"
            f"{found_s / base_s:16.3f}{foretold_s[policy] / base_foretold_s:10.3f}"
        )
    if "adaptive" in jct:
        faster = float(np.median(jct["adaptive"])) / base_s
        kept = float(np.median(rates["adaptive"])) / float(np.median(rates["fcfs"]))
        missed |= faster > FASTER or kept < THROUGHPUT
        print(
            f"adaptive / fcfs: mean JCT {faster:.3f} (asked {FASTER}), tokens/s {kept:.3f} "
            f"(asked {THROUGHPUT})"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
