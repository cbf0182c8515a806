"""Microseconds of plan + commit on this machine, by policy and number of live requests.

    python bench/scheduler.py [--slots 64] [--steps 300]

The device is an oracle that answers at once and is not counted. "steady" has the pool all waiting
requests could wish for; "pressed" has pages for half of the slots, so that sequences are preempted.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque

from fastserve_jax.core.policy import POLICIES, make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import DoneEvent, Plan, Request, Sampled, Sampling, StepResult

PROMPT_TOKENS, OUTPUT_TOKENS, STEP_S = 256, 256, 0.02


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=300)
    options = arguments.parse_args()
    print(f"slots {options.slots}, prompts about {PROMPT_TOKENS}, outputs about {OUTPUT_TOKENS}")
    print("policy  pages    live  median us  p99 us  rows  preemptions")
    for policy in POLICIES:
        for pages in ("steady", "pressed"):
            for live in (100, 1_000, 10_000):
                measure(policy, pages, live, options.slots, options.steps)


def measure(policy: str, pages: str, live: int, slots: int, steps: int) -> None:
    page_size = 16
    per_sequence = 2 * (PROMPT_TOKENS + OUTPUT_TOKENS) // page_size
    limits = Limits(
        page_size=page_size,
        num_pages=per_sequence * slots // (1 if pages == "steady" else 4),
        max_slots=slots,
        step_tokens=slots + 512,
        max_queue=live,
        max_live=live,
    )
    scheduler, rng = Scheduler(limits, make_policy(policy)), random.Random(1)
    vocabulary = range(30_000)
    ids, now = iter(range(1, 1 << 30)), 0.0

    def submit() -> None:
        prompt = tuple(rng.choices(vocabulary, k=rng.randint(1, 2 * PROMPT_TOKENS)))
        output = Sampling(max_tokens=rng.randint(1, 2 * OUTPUT_TOKENS))
        scheduler.submit(Request(next(ids), prompt, output), now)

    for _ in range(live):
        submit()
    flight: deque[Plan] = deque()
    spent_us: list[float] = []
    rows = 0
    while len(spent_us) < 2 * steps:
        now += STEP_S
        began = time.perf_counter_ns()
        plan = scheduler.plan(now)
        planned = time.perf_counter_ns()
        if plan is not None:
            flight.append(plan)
        oldest = flight.popleft() if len(flight) == 2 or plan is None else None
        if oldest is None:
            continue
        rows += len(oldest.work)
        result = StepResult({work.request_id: Sampled(7) for work in oldest.work if work.samples})
        resumed = time.perf_counter_ns()
        events = scheduler.commit(oldest, result, STEP_S, now)
        spent_us.append((time.perf_counter_ns() - resumed + planned - began) / 1000)
        for event in events:
            if isinstance(event, DoneEvent):
                submit()
    spent_us = sorted(spent_us[steps:])  # the first half fills the slots
    preemptions = scheduler.stats().preemptions
    print(
        f"{policy:6}  {pages:7}{live:6}  {spent_us[steps // 2]:9.0f}"
        f"{spent_us[steps * 99 // 100]:8.0f}{rows / (2 * steps):6.1f}{preemptions:13}"
    )


if __name__ == "__main__":
    main()
