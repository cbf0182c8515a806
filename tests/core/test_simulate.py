"""Virtual time, against times worked out by hand: every step takes one second."""

import random

import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import POLICIES, make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.simulate import STOP, Run, simulate
from fastserve_jax.core.types import Request, Sampling

SECOND = CostModel([1.0], (1,), 0.0, 0.0)
LIMITS = Limits(page_size=4, num_pages=100, max_slots=4, step_tokens=64, max_context=1024)

Arrival = tuple[float, int, int]  # seconds, prompt tokens, output tokens


def play(
    arrivals: list[Arrival],
    policy: str = "fcfs",
    limits: Limits = LIMITS,
    device: CostModel = SECOND,
    cost: CostModel | None = None,
    max_tokens: int = 100,
    **options,
) -> Run:
    """Requests are numbered from 1 in the order given, and share no token."""
    lengths = {i: output for i, (_, _, output) in enumerate(arrivals, 1)}
    sampling = Sampling(max_tokens, stop_ids=frozenset([STOP]))
    requests = [
        (at, Request(i, (10 + i,) * prompt, sampling))
        for i, (at, prompt, _) in enumerate(arrivals, 1)
    ]
    cost = cost or device.copy()
    scheduler = Scheduler(limits, make_policy(policy, limits, cost, lengths.__getitem__), cost)
    return simulate(scheduler, requests, lengths, device, **options)


def times(run: Run) -> list[tuple[float, float]]:
    """(first token, done) in order of request."""
    lives = sorted(run.lives, key=lambda life: life.request_id)
    return [(life.first_token_s, life.done_s) for life in lives]


THREE = [(0.0, 2, 3), (0.0, 2, 1), (0.5, 2, 2)]


def test_one_step_after_the_other():
    """0 to 1: both prompts. 1 to 2: the first, and the third's prompt. 2 to 3: both."""
    run = play(THREE, overlap=False)
    assert times(run) == [(1.0, 3.0), (1.0, 1.0), (2.0, 3.0)]
    assert (run.steps, run.busy_s, run.end_s) == (3, 3.0, 3.0)


def test_with_overlap_plans_are_one_step_ahead():
    """The step from 1 to 2 was planned at 0, so the third is in the one from 2 to 3. Stops are
    noticed while the next step runs: the one from 4 to 5 is for nothing."""
    run = play(THREE)
    assert times(run) == [(1.0, 3.0), (1.0, 1.0), (3.0, 4.0)]
    assert (run.steps, run.busy_s, run.end_s) == (5, 5.0, 5.0)


def test_who_ends_at_its_limit_wastes_no_step():
    run = play([(0.0, 2, 3)], max_tokens=3)
    assert times(run) == [(1.0, 3.0)]
    assert (run.steps, run.end_s) == (3, 3.0)
    assert play([(0.0, 2, 9)], max_tokens=3).lives[0].output_tokens == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_an_idle_device_starts_at_once(overlap):
    run = play([(0.0, 2, 1), (10.25, 2, 1)], overlap=overlap)
    assert times(run) == [(1.0, 1.0), (11.25, 11.25)]
    assert run.busy_s < 5.0


def test_who_waits_for_a_slot_waits_in_line():
    one_slot = Limits(page_size=4, num_pages=64, max_slots=1, step_tokens=64, max_context=1024)
    run = play([(0.0, 2, 2), (0.0, 2, 2), (0.0, 2, 2)], limits=one_slot, overlap=False)
    assert times(run) == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]


def test_a_long_prompt_takes_its_chunks_and_the_gap_is_seen():
    """Of a budget of 64 a row leaves 63: 200 tokens take four steps, and delay nobody here."""
    run = play([(0.0, 2, 8), (0.5, 200, 1)], overlap=False)
    assert times(run) == [(1.0, 8.0), (5.0, 5.0)]
    assert run.lives[0].longest_gap_s == 1.0
    token_s = CostModel([0.0], (1,), 0.5, 0.25)
    run = play([(0.0, 2, 8), (0.5, 200, 1)], device=token_s, overlap=False)
    # 1.0 for the first prompt; then steps of a row and 63 tokens, the last of 11; then rows.
    step_s = 0.25 + 63 * 0.5
    assert run.lives[0].longest_gap_s == step_s
    assert times(run) == [
        (1.0, 1.0 + 3 * step_s + (0.25 + 11 * 0.5) + 3 * 0.25),
        (1.0 + 3 * step_s + 5.75,) * 2,
    ]


def test_a_run_can_be_cut_off():
    run = play([*THREE, (7.0, 5, 9)], until_s=2.5, overlap=False)
    assert times(run) == [(1.0, 3.0), (1.0, 1.0), (2.0, 3.0), (-1.0, -1.0)]
    assert run.end_s == 3.0
    assert run.lives[3].output_tokens == 9
    run = play(THREE, until_s=2.0, overlap=False)
    assert times(run) == [(1.0, -1.0), (1.0, 1.0), (2.0, -1.0)]
    assert [life.produced for life in run.lives] == [2, 1, 1]


def test_the_scheduler_is_seen_at_intervals():
    run = play([(0.0, 2, 12)] * 6, sample_every_s=3.0, overlap=False)
    assert [sample.time_s for sample in run.samples] == pytest.approx([1, 4, 7, 10, 13, 16, 19, 22])
    assert (run.samples[1].running, run.samples[1].waiting) == (4, 2)
    assert run.samples[1].pages_used > 0


def test_progress_is_told():
    heard = []
    one_slot = Limits(page_size=4, num_pages=64, max_slots=1, step_tokens=64, max_context=1024)
    play([(0.0, 2, 200)] * 3, max_tokens=200, limits=one_slot, progress=heard.append)
    assert heard == [1, 2, 3]  # at steps 256 and 512, and in the end


def test_the_clock_of_the_caller_is_only_looked_at():
    ticks = iter(range(10**6))
    run = play(THREE, timer=lambda: float(next(ticks)))
    assert times(run) == times(play(THREE))
    assert run.plan_commit_s >= run.steps


# On random work


def crowd(count: int, seed: int = 1) -> list[Arrival]:
    rng, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(9.0)
        arrivals.append((at, rng.randint(1, 40), 1 + int(rng.expovariate(1 / 12))))
    return arrivals


TIGHT = Limits(
    page_size=4, num_pages=40, host_pages=200, max_slots=6, step_tokens=32, max_context=160
)
DEVICE = CostModel([0.01, 0.02], (8, 64), 1e-3, 2e-3, 1e-6, page_out_s=2e-3, page_in_s=2e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_gets_every_token_and_twice_the_same(policy):
    runs = [play(crowd(150), policy, TIGHT, DEVICE) for _ in range(2)]
    assert runs[0] == runs[1]
    run = runs[0]
    assert all(life.produced == life.output_tokens for life in run.lives)
    assert all(life.arrival_s < life.first_token_s <= life.done_s for life in run.lives)
    stats = run.stats
    assert (stats.finished, stats.running, stats.waiting) == (150, 0, 0)
    assert stats.output_tokens == sum(life.output_tokens for life in run.lives)
    assert stats.steps == run.steps
    assert stats.busy_s == pytest.approx(run.busy_s)


@pytest.mark.parametrize("policy", ["mlfq", "srpt-oracle"])
def test_waiting_for_copies_is_told(policy):
    run = play(crowd(150), policy, TIGHT, DEVICE)
    stats = run.stats
    assert stats.pages_in > 0
    assert run.stall_s == pytest.approx((stats.pages_out + stats.pages_in) * 2e-3)
    assert stats.stall_s == pytest.approx(run.stall_s)


def test_the_schedulers_own_model_learns_from_the_device():
    wrong = CostModel([0.013, 0.026], (8, 64), 1.3e-3, 2.6e-3, 1.3e-6)
    errors = [play(crowd(n), "fcfs", TIGHT, DEVICE, wrong.copy()).stats.cost_error for n in (2, 99)]
    assert errors[0] > 0.09
    assert errors[1] < 0.05
