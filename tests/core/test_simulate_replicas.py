"""Many replicas in virtual time: one of them is the plain simulation, and many are its like."""

from random import Random

import pytest

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.routing import POLICIES, Router
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.simulate import STOP, simulate
from fastserve_jax.core.simulate_replicas import simulate_replicas
from fastserve_jax.core.types import Request, Sampling

LIMITS = Limits(
    num_pages=400, max_slots=8, step_tokens=64, max_context=400, max_queue=9999, max_live=9999
)
DEVICE = CostModel([0.01], (1,), 1e-4, 1e-4)


def scheduler(policy="fcfs"):
    cost = DEVICE.copy()
    return Scheduler(LIMITS, make_policy(policy, LIMITS, cost), cost)


def load(count, every_s, seed=0, groups=0):
    """Arrivals and lengths; of `groups` each has a prompt of its own, the longer part shared."""
    rng = Random(seed)
    arrivals, lengths = [], {}
    for number in range(count):
        own = (1000 + number,) * rng.randrange(8, 40)
        prompt = own if not groups else (7 + number % groups,) * 160 + own
        rules = Sampling(200, stop_ids=frozenset({STOP}))
        arrivals.append((number * every_s, Request(number, prompt, rules)))
        lengths[number] = rng.randrange(2, 60)
    return arrivals, lengths


def run(replicas, arrivals, lengths, router="least", beginnings=lambda _: (), policy="fcfs"):
    return simulate_replicas(
        [scheduler(policy) for _ in range(replicas)],
        Router(router, Random(0).sample),
        arrivals,
        lengths,
        DEVICE,
        expected_tokens=30,
        beginnings=beginnings,
        block_tokens=160,
    )


def mean_jct_s(run):
    assert all(life.done_s >= 0 for life in run.lives)
    return sum(life.done_s - life.arrival_s for life in run.lives) / len(run.lives)


@pytest.mark.parametrize("policy", ["fcfs", "adaptive"])
def test_one_replica_is_the_plain_simulation(policy):
    arrivals, lengths = load(300, 0.12)
    plain = simulate(scheduler(policy), arrivals, lengths, DEVICE)
    one, routing = run(1, arrivals, lengths, policy=policy)
    assert mean_jct_s(one) == pytest.approx(mean_jct_s(plain), rel=0.03)
    assert one.offered_tokens == pytest.approx(plain.offered_tokens, rel=0.01)
    assert one.end_s == pytest.approx(plain.end_s, rel=0.01)
    assert [life.produced for life in one.lives] == [lengths[life.request_id] for life in one.lives]
    assert routing.sent == {"0": 300}


@pytest.mark.parametrize("router", POLICIES)
def test_ten_replicas_do_ten_times_as_much(router):
    few, lengths = load(200, 0.12)
    many, more_lengths = load(2000, 0.012)
    one, _ = run(1, few, lengths)
    ten, routing = run(10, many, more_lengths, router)
    assert routing.decisions == 2000
    assert len(routing.sent) == 10
    assert max(routing.sent.values()) < 300
    assert mean_jct_s(ten) < 1.15 * mean_jct_s(one)
    assert ten.busy_s == pytest.approx(10 * one.busy_s, rel=0.1)


def test_each_scheduler_is_told_what_its_own_steps_took():
    """However many others' steps end meanwhile."""
    arrivals, lengths = load(1000, 0.012)
    replicas = [scheduler("adaptive") for _ in range(10)]
    real = {replica: replica.commit for replica in replicas}
    for replica in replicas:

        def checked(plan, result, elapsed_s, now, replica=replica):
            assert elapsed_s == pytest.approx(DEVICE.step_s(plan.load))
            return real[replica](plan, result, elapsed_s, now)

        replica.commit = checked
    ran, _ = simulate_replicas(
        replicas,
        Router("least", Random(0).sample),
        arrivals,
        lengths,
        DEVICE,
        expected_tokens=30,
        beginnings=lambda _: (),
        block_tokens=160,
    )
    assert ran.stats.busy_s == pytest.approx(ran.busy_s)


def test_a_router_that_knows_prefixes_computes_less():
    arrivals, lengths = load(600, 0.03, groups=12)
    cached = {}
    for router in POLICIES:
        ran, _ = run(4, arrivals, lengths, router, beginnings=lambda number: (number % 12,))
        cached[router] = ran.stats.prefix_hit_tokens / ran.stats.prefix_query_tokens
        assert mean_jct_s(ran) > 0
    assert cached["prefix"] > 0.75
    assert cached["prefix"] > cached["least"]


def test_two_by_lot_wait_less_than_turns_when_lengths_differ():
    arrivals, lengths = load(1500, 0.0115, seed=3)
    lengths = {
        number: length * (8 if number % 10 == 0 else 1) // 2 + 2
        for number, length in lengths.items()
    }
    by_lot, _ = run(10, arrivals, lengths, "least")
    by_turns, _ = run(10, arrivals, lengths, "round-robin")
    assert mean_jct_s(by_lot) < mean_jct_s(by_turns)
