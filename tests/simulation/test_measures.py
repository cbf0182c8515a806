"""Rows against lives worked out by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.simulate import Life, Run, simulate
from fastserve_jax.simulation.measures import (
    alone_s,
    by_decile,
    completion_s,
    row,
    slo_throughput,
)
from fastserve_jax.simulation.workload import Workload

KEYS = ["policy", "load", "rho", "slots", "pages", "seed", "requests", "unfinished"]
KEYS += ["jct_mean_s", "jct_p50_s", "jct_p95_s", "jct_p99_s", "ttft_mean_s", "ttft_p99_s"]
KEYS += ["stall_max_s", "slowdown_mean", "normalized_latency_mean_s", "tokens_per_s"]
KEYS += ["swap_stall_fraction", "swap_bytes_per_token", "preemptions_per_request"]
KEYS += ["plan_commit_us"]

# A step takes 1 s, a prompt token 0.1 s more, a decode row 0.5 s, a key 0.01 s.
DEVICE = CostModel([1.0], (1,), 0.1, 0.5, 0.01, page_bytes=1000)


def workload(prompts, outputs):
    arrivals = np.arange(len(prompts), dtype=float)
    return Workload("hand", arrivals, np.array(prompts), np.array(outputs))


def run(lives, **numbers):
    limits = Limits()
    stats = Scheduler(limits, make_policy("fcfs", limits, DEVICE), DEVICE).stats()
    stats = replace(stats, preemptions=6, pages_out=30, pages_in=10)
    return Run(lives, stats, **numbers)


LIVES = [
    # id, arrival, prompt, output, first token, last token, done, longest gap, produced
    Life(0, 0.0, 10, 1, 2.0, 2.0, 2.0, 0.0, 1),
    Life(1, 1.0, 10, 4, 3.0, 9.0, 9.0, 4.0, 4),
    Life(2, 2.0, 10, 9, 8.0, 12.0, -1.0, 1.0, 3),  # cut off
]


def measured(lives=LIVES):
    given = workload([10, 10, 10], [1, 4, 9])
    ran = run(lives, end_s=16.0, busy_s=10.0, stall_s=1.0, plan_commit_s=0.002, steps=10)
    return row("mlfq", "hand", 0.9, 16, 100, 3, given, ran, DEVICE, 512)


def test_a_row_has_exactly_its_keys_and_is_json():
    found = measured()
    assert list(found) == KEYS
    assert json.loads(json.dumps(found)) == found


def test_a_row_by_hand():
    found = measured()
    assert (found["policy"], found["load"], found["rho"]) == ("mlfq", "hand", 0.9)
    assert (found["slots"], found["pages"], found["seed"]) == (16, 100, 3)
    assert (found["requests"], found["unfinished"]) == (3, 1)
    assert found["jct_mean_s"] == pytest.approx((2 + 8) / 2)
    assert found["jct_p50_s"] == pytest.approx(5.0)
    assert found["jct_p99_s"] == pytest.approx(2 + 0.99 * 6)
    assert found["ttft_mean_s"] == pytest.approx((2 + 2 + 6) / 3)
    assert found["stall_max_s"] == 4.0
    assert found["normalized_latency_mean_s"] == pytest.approx((2 / 1 + 8 / 4) / 2)
    assert found["tokens_per_s"] == pytest.approx(8 / 16)  # what the cut off one got counts
    assert found["swap_stall_fraction"] == pytest.approx(0.1)
    assert found["swap_bytes_per_token"] == pytest.approx(1000 * 40 / 8)
    assert found["preemptions_per_request"] == pytest.approx(2.0)
    assert found["plan_commit_us"] == pytest.approx(200.0)
    # Alone: 10 prompt tokens in one step, 1 + 1 s and the keys; three more steps of 1.5 s.
    keys = 0.01 * (10 / 2) * (10 / 64)
    alone = [2 + keys, 2 + keys + 3 * 1.5 + 0.01 * (11 + 12 + 13)]
    assert found["slowdown_mean"] == pytest.approx((2 / alone[0] + 8 / alone[1]) / 2)


def test_nobody_finished_is_not_a_number():
    found = measured([replace(LIVES[2], request_id=i, first_token_s=-1.0) for i in range(3)])
    assert found["unfinished"] == 3
    for key in ("jct_mean_s", "jct_p99_s", "ttft_p99_s", "slowdown_mean"):
        assert found[key] is None
    assert json.loads(json.dumps(found)) == found


def test_requests_that_never_came_are_unfinished():
    jct_s = completion_s(workload([1, 1, 1, 1], [1, 1, 1, 1]), run(LIVES))
    assert jct_s[:2].tolist() == [2.0, 8.0]
    assert np.isnan(jct_s[2:]).all()


@pytest.mark.parametrize("prompt", [1, 63, 64, 300, 1024])
def test_alone_is_what_the_simulator_takes_for_one(prompt):
    """The closed form against the real thing."""
    given = workload([prompt], [40])
    device = CostModel([0.01], (1,), 1e-4, 5e-5, 1e-6)
    limits = Limits(step_tokens=128, max_slots=4, max_context=4096)
    scheduler = Scheduler(limits, make_policy("fcfs", limits, device.copy()), device.copy())
    ran = simulate(scheduler, given.arrivals(4096), given.lengths(), device)
    assert alone_s(given, device, 128)[0] == pytest.approx(ran.lives[0].done_s, rel=0.005)


def test_deciles_are_tenths_by_length():
    outputs = np.arange(100, 0, -1)
    jct_s = outputs * 2.0
    jct_s[0] = np.nan  # the longest did not finish
    tenths = by_decile(outputs, jct_s)
    assert [tenth.most_tokens for tenth in tenths] == list(range(10, 101, 10))
    assert tenths[0].jct_mean_s == pytest.approx(11.0)
    assert tenths[9].jct_mean_s == pytest.approx(2 * np.mean(range(91, 100)))
    assert [tenth.unfinished for tenth in tenths] == [0] * 9 + [1]


def test_the_load_that_holds_a_bound():
    assert slo_throughput([(0.5, 0.1), (1.0, 0.5)]) == (pytest.approx(0.75), "=")
    assert slo_throughput([(1.0, 0.5), (0.5, 0.1)]) == (pytest.approx(0.75), "=")
    assert slo_throughput([(0.5, 0.1), (1.0, 0.2)]) == (1.0, ">")
    assert slo_throughput([(0.5, 0.4), (1.0, 0.5)]) == (0.5, "<")
    assert slo_throughput([(0.5, float("nan"))]) is None


def test_a_lucky_point_beyond_the_crossing_does_not_count():
    # 0.5 and 0.1 pool into 0.3, so the bound is held to 1.2 and not beyond.
    points = [(0.8, 0.2), (1.0, 0.5), (1.2, 0.1), (1.4, 0.9)]
    assert slo_throughput(points) == (pytest.approx(1.2), "=")
