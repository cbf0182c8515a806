"""Workloads: windows, rates, and prompts that share exactly what the trace says."""

import numpy as np
import pytest

from fastserve_jax.core.simulate import STOP
from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.workload import Workload

CONTEXT = 100_000


def workload(arrivals=(0.0, 1.0, 4.0), prompts=(5, 600, 3), outputs=(2, 9, 4), **more):
    return Workload("w", np.array(arrivals, float), np.array(prompts), np.array(outputs), **more)


def prompts_of(workload):
    return [request.prompt for _, request in workload.arrivals(CONTEXT)]


def common(a, b):
    """How many leading tokens two prompts share."""
    same = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(same, min(len(a), len(b)))


def test_a_window_begins_with_its_first_request():
    cut = workload(clients=("a", "b", "c"), blocks=((1,), (1, 2), (3,))).window(1, 5)
    assert cut.arrival_s.tolist() == [0.0, 3.0]
    assert cut.prompt_tokens.tolist() == [600, 3]
    assert cut.clients == ("b", "c")
    assert cut.blocks == ((1, 2), (3,))
    assert len(workload().first(1)) == 1


def test_keeping_some_keeps_when_they_came():
    kept = workload().kept(np.array([True, False, True]))
    assert kept.arrival_s.tolist() == [0.0, 4.0]
    assert kept.output_tokens.tolist() == [2, 4]


def test_scaling_stretches_the_same_pattern():
    before = workload()
    assert before.arrivals_per_s == pytest.approx(0.5)
    after = before.scaled_to(2.0)
    assert after.arrivals_per_s == pytest.approx(2.0)
    assert after.arrival_s.tolist() == pytest.approx([0.0, 0.25, 1.0])
    assert (after.output_tokens == before.output_tokens).all()


def test_one_moment_has_no_rate():
    with pytest.raises(ConfigError, match="arrive at one moment"):
        workload().at_once().scaled_to(1.0)


def test_requests_say_what_a_client_could_know():
    made = list(workload(clients=("a", "b", "a")).arrivals(CONTEXT))
    assert [now for now, _ in made] == [0.0, 1.0, 4.0]
    requests = [request for _, request in made]
    assert [request.id for request in requests] == [0, 1, 2]
    assert [len(request.prompt) for request in requests] == [5, 600, 3]
    # The longest output of all, whatever their own: nothing to order by.
    assert {request.sampling.max_tokens for request in requests} == {9}
    assert all(request.sampling.stop_ids == {STOP} for request in requests)
    assert [request.client for request in requests] == ["a", "b", "a"]


def test_a_cap_stands_above_the_longest_output():
    _, request = next(iter(workload(cap=50).arrivals(CONTEXT)))
    assert request.sampling.max_tokens == 50


def test_max_tokens_end_with_the_context_by_the_prompt_alone():
    requests = [request for _, request in workload(outputs=(2, 9, 9)).arrivals(609)]
    assert [request.sampling.max_tokens for request in requests] == [9, 9, 9]
    requests = [request for _, request in workload(cap=50).arrivals(609)]
    assert [request.sampling.max_tokens for request in requests] == [50, 9, 50]
    assert workload(cap=50).most_tokens(609) == 609
    assert workload(cap=50).most_tokens(1000) == 650


def test_without_hashes_nobody_shares_anything():
    prompts = prompts_of(workload())
    assert all(common(a, b) == 0 for a in prompts for b in prompts if a is not b)
    assert len({token for prompt in prompts for token in prompt}) == 3
    assert all(0 <= token < 1 << 32 for prompt in prompts for token in prompt)


def test_prompts_are_equal_exactly_as_far_as_their_hashes():
    blocks = ((7, 8, 9), (7, 8, 10), (7, 11), (7, 8, 9), (12,), (8,))
    lengths = (1200, 1500, 700, 1200, 512, 512)
    made = workload(range(6), lengths, [1] * 6, blocks=blocks)
    prompts = prompts_of(made)
    assert [len(prompt) for prompt in prompts] == list(lengths)
    assert common(prompts[0], prompts[1]) == 1024
    assert common(prompts[0], prompts[2]) == 512
    assert prompts[0] == prompts[3]
    assert common(prompts[0], prompts[4]) == 0
    assert common(prompts[0], prompts[5]) == 0  # the same block elsewhere is another prefix


def test_what_has_no_hash_is_its_own():
    made = workload((0, 1), (1024, 1024), (1, 1), blocks=((7,), (7,)))
    a, b = prompts_of(made)
    assert common(a, b) == 512
    assert len({a[0], a[512], b[512]}) == 3  # nor does it ever look like a block with one
