"""One cell: what a load is worth, who is left out, who is told what, and all cores alike."""

from pathlib import Path

import numpy as np
import pytest

from fastserve_jax.core.policy import POLICIES
from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.devices import read_device
from fastserve_jax.simulation.pool import run_cells
from fastserve_jax.simulation.run import Cell, Source, capacity, parse_policy, prepare, run_cell

DEVICE = read_device("a100-opt13b")


def cell(spec="poisson:n=40;in=fixed:32;out=uniform:5:40", policy="fcfs", **more):
    settings = {"slots": 4, "rho": 0.9}
    return Cell(Source(spec), policy, DEVICE, **(settings | more))


def test_capacity_is_that_of_full_slots():
    """Equal requests without prompts to speak of: slots / (steps x step time)."""
    spec = "poisson:n=200;in=fixed:1;out=uniform:90:110"
    step_s = 0.018 + 4 * 0.05e-3 + 4 * 50 * 0.82e6 / 1.6e12
    assert capacity(cell(spec)) == pytest.approx(4 / (100 * step_s), rel=0.03)


def test_capacity_does_not_depend_on_policy_rho_or_horizon():
    found = capacity(cell())
    assert capacity(cell(policy="mlfq", rho=0.2, until_s=0.1)) == found
    assert cell().ground == cell(policy="mlfq", rho=0.2, until_s=0.1, timeline=True).ground
    for other in ({"slots": 5}, {"seed": 1}, {"pages": 50}, {"page_size": 8}, {"step_tokens": 64}):
        assert cell(**other).ground != cell().ground


@pytest.mark.parametrize("rho", [0.5, 1.2])
def test_rho_stretches_arrivals_to_its_share_of_capacity(rho):
    # Requests of one token and hardly any work end as they come.
    spec = "poisson:n=100;in=fixed:1;out=fixed:1"
    outcome = run_cell(cell(spec, rho=rho, slots=16, timeline=True), 2.0)
    assert outcome.samples[-1].time_s == pytest.approx(99 / (2.0 * rho), abs=1.0)
    assert outcome.row["rho"] == rho


def test_arrivals_stay_as_they_are_without_rho():
    outcome = run_cell(cell("poisson:n=50,rate=0.5;in=fixed:1;out=fixed:1", rho=None))
    assert outcome.row["rho"] is None
    assert outcome.row["tokens_per_s"] == pytest.approx(0.5, rel=0.5)
    with pytest.raises(ConfigError, match="give --rho"):
        run_cell(cell(rho=None))


def test_all_policies_get_the_same_requests_and_finish_them():
    found = capacity(cell())
    outcomes = {name: run_cell(cell(policy=name, rho=1.2), found) for name in POLICIES}
    for name, outcome in outcomes.items():
        assert outcome.row["policy"] == name
        assert outcome.row["requests"] == 40
        assert outcome.row["unfinished"] == 0
        assert outcome.row["plan_commit_us"] > 0
        assert (outcome.output_tokens == outcomes["fcfs"].output_tokens).all()
        assert (outcome.jct_s > 0).all()
    assert outcomes["srpt-oracle"].row["jct_mean_s"] < outcomes["fcfs"].row["jct_mean_s"]


def test_pages_are_enough_for_fcfs_where_nobody_says():
    _, limits, left_out = prepare(cell())
    # The largest request is 32 + 40 tokens, 5 pages; one each to grow into.
    assert limits.num_pages == 4 * 6
    assert limits.host_pages == 4 * 24
    assert left_out == 0
    assert prepare(cell(slots=1000))[1].num_pages < 40 * 7  # never more than all need together
    assert run_cell(cell(), 2.0).row["preemptions_per_request"] == 0


def test_step_tokens_are_never_fewer_than_slots():
    assert prepare(cell())[1].step_tokens == 512
    assert prepare(cell(slots=600))[1].step_tokens == 600
    with pytest.raises(ConfigError, match="step_tokens"):
        prepare(cell(slots=600, step_tokens=64))


@pytest.mark.parametrize("policy", ["fcfs", "adaptive"])
def test_who_could_never_fit_is_left_out_for_all(policy):
    whole = Source(cell().source.spec).workload(0)
    outcome = run_cell(cell(policy=policy, pages=3), 2.0)  # 48 tokens: outputs of 16 and fewer
    fit = whole.output_tokens <= 16
    assert outcome.left_out == int((~fit).sum())
    assert outcome.output_tokens.tolist() == whole.output_tokens[fit].tolist()
    assert outcome.row["requests"] == fit.sum()
    assert outcome.row["unfinished"] == 0
    with pytest.raises(ConfigError, match="raise --pages"):
        prepare(cell(pages=2))


def test_a_horizon_leaves_work_unfinished_and_counts_it():
    outcome = run_cell(cell(until_s=3.0), 2.0)
    unfinished = outcome.row["unfinished"]
    assert 0 < unfinished < 40
    assert np.isnan(outcome.jct_s).sum() == unfinished


def test_a_tight_pool_is_felt():
    tight = run_cell(cell(policy="mlfq", pages=8, rho=1.2), 2.0)
    assert tight.row["pages"] == 8
    assert tight.row["preemptions_per_request"] > 0
    assert tight.row["unfinished"] == 0


def test_timelines_are_kept_only_where_asked_for():
    outcome = run_cell(cell(timeline=True), 2.0)
    assert 100 < len(outcome.samples) < 2000
    assert max(sample.running for sample in outcome.samples) <= 4
    assert not run_cell(cell(), 2.0).samples


# Who is told what


def told(policy, seed=0):
    workload = cell().source.workload(0)
    lengths = parse_policy(policy).lengths(workload, seed)
    return lengths and np.array([lengths(i) for i in range(len(workload))])


def test_only_oracles_know_the_truth():
    true = cell().source.workload(0).output_tokens
    for name in ("sjf-oracle", "srpt-oracle"):
        assert told(name).tolist() == true.tolist()
    for name in ("fcfs", "mlfq", "adaptive", "run-to-completion"):
        assert told(name) is None


def test_predictions_err_by_sigma_and_alike_for_all():
    workload = Source("poisson:n=4000;out=fixed:100").workload(0)
    for policy, sigma in (("srpt-predicted", 0.6), ("adaptive:sigma=0.2", 0.2)):
        lengths = parse_policy(policy).lengths(workload, 1)
        log = np.log([lengths(i) / 100 for i in range(4000)])
        assert log.std() == pytest.approx(sigma, rel=0.05)
        assert log.mean() == pytest.approx(0.0, abs=0.05)
    assert told("srpt-predicted").tolist() == told("adaptive:sigma=0.6").tolist()
    assert told("srpt-predicted").tolist() != told("srpt-predicted", seed=1).tolist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best", "choose among run-to-completion, fcfs"),
        ("fcfs:sigma=1", "srpt-predicted:sigma=0.6"),
        ("adaptive:alpha=1", "only option"),
        ("fcfs:starve=1", "mlfq:starve=3"),
        ("mlfq:sigma=1", "mlfq:starve=3"),
        ("mlfq:starve=-1", "only option"),
        ("adaptive:sigma=", "only option"),
        ("adaptive:sigma=nan", "only option"),
        ("adaptive:sigma=-1", "only option"),
    ],
)
def test_policies_that_are_none(text, said):
    with pytest.raises(ConfigError) as raised:
        parse_policy(text)
    assert said in str(raised.value)


# Many


def timeless(outcome):
    return {key: value for key, value in outcome.row.items() if key != "plan_commit_us"}


def test_processes_change_nothing_but_the_time_it_takes():
    cells = [
        cell(policy=policy, rho=rho, seed=seed)
        for rho in (0.8, 1.1)
        for policy in ("fcfs", "mlfq")
        for seed in (0, 1)
    ]
    heard = []
    alone = run_cells(cells, 1)
    spread = run_cells(cells, 2, lambda done, of: heard.append((done, of)))
    assert [timeless(outcome) for outcome in spread] == [timeless(outcome) for outcome in alone]
    assert [outcome.cell for outcome in spread] == cells
    assert spread[0].capacity == capacity(cells[0])
    assert heard[-1] == (10, 10)  # eight cells, and a capacity for each seed
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_an_error_in_a_process_arrives_as_it_is():
    missing = Cell(Source(trace=Path("/no/such")), "fcfs", DEVICE, rho=0.9)
    with pytest.raises(ConfigError, match="/no/such"):
        run_cells([missing, cell()], 2)
    with pytest.raises(ConfigError, match="--jobs"):
        run_cells([cell()], 0)
