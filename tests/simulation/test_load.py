"""Generated load: what a spec means, what is refused, and that the numbers are what it says."""

import numpy as np
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.load import parse_load

N = 20_000


def drawn(lengths, n=N, seed=3):
    return parse_load(f"poisson:n={n},rate=1;out={lengths}").workload(seed).output_tokens


def test_defaults_are_the_documented_ones():
    load = parse_load("poisson")
    assert (load.n, load.rate, load.cv) == (2000, None, 1.0)
    assert (load.prompt.family, load.prompt.values, load.prompt.cap) == (
        "lognormal",
        (80, 1.2),
        2048,
    )
    assert (load.output.values, load.output.cap) == ((200, 1.1), 1024)


def test_a_whole_spec():
    load = parse_load(" gamma:cv=4, n=50,rate=2.5; in=fixed:7 ;out=lognormal:20:0.5:64")
    assert (load.n, load.rate, load.cv) == (50, 2.5, 4.0)
    workload = load.workload(0)
    assert workload.name == "gamma:cv=4,n=50,rate=2.5;in=fixed:7;out=lognormal:20:0.5:64"
    assert len(workload) == 50
    assert set(workload.prompt_tokens) == {7}
    assert workload.output_tokens.max() <= 64
    assert workload.longest_output == 64
    assert workload.timed


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "arrivals are poisson"),
        ("weibull:n=3", "'weibull:n=3': arrivals are poisson:n=N"),
        ("poisson:cv=2", "'cv=2'"),
        ("poisson:n=0", "'n=0'"),
        ("poisson:n=2.5", "'n=2.5'"),
        ("poisson:n=10000000", "1,000,000"),
        ("poisson:rate=-1", "'rate=-1'"),
        ("poisson:rate=nan", "'rate=nan'"),
        ("poisson:n", "'n'"),
        ("gamma:cv=0", "cv is 0.05 to 20"),
        ("poisson;output=fixed:3", "'output=fixed:3'"),
        ("poisson;in", "'in'"),
        ("poisson;in=fixed:3;in=fixed:4", "each once"),
        ("poisson;in=normal:3:4", "lognormal:MEDIAN:SIGMA, pareto:ALPHA:MINIMUM"),
        ("poisson;in=lognormal:80", "write lognormal:MEDIAN:SIGMA"),
        ("poisson;in=lognormal:80:1:2048:9", "write lognormal:MEDIAN:SIGMA"),
        ("poisson;in=lognormal:x:1", "in numbers"),
        ("poisson;in=lognormal:80:-1", "SIGMA"),
        ("poisson;in=lognormal:4000:1", "half or more would be cut at 2048"),
        ("poisson;out=pareto:0.9:2000", "half or more would be cut at 1024"),
        ("poisson;out=pareto:0:20", "ALPHA"),
        ("poisson;out=bimodal:20:800:1.5", "SHARE_OF_LONG is 0 to 1"),
        ("poisson;out=uniform:50:10", "LOW is above HIGH"),
        ("poisson;out=fixed:0", "token counts are 1"),
        ("poisson;out=fixed:2.5", "whole numbers"),
        ("poisson;out=fixed:5:0", "the cap is a whole number"),
        ("poisson;out=fixed:99999999", "token counts are 1"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(spec, said):
    with pytest.raises(ConfigError) as raised:
        parse_load(spec)
    assert said in str(raised.value)
    assert str(raised.value).startswith("--load: ")
    assert "\n" not in str(raised.value)


def test_lognormal_has_its_median_and_spread():
    log = np.log(drawn("lognormal:200:0.5:100000"))
    assert np.exp(np.median(log)) == pytest.approx(200, rel=0.03)
    assert log.std() == pytest.approx(0.5, rel=0.03)


def test_a_cap_cuts():
    values = drawn("lognormal:200:1.1")
    assert values.max() == 1024
    # P(exp(1.1 z) > 1024/200)
    assert (values == 1024).mean() == pytest.approx(0.0687, abs=0.006)


def test_pareto_has_its_median_and_minimum():
    values = drawn("pareto:0.9:20:1000000")
    assert values.min() == 20
    assert np.median(values) == pytest.approx(20 * 2 ** (1 / 0.9), rel=0.03)


def test_bimodal_has_its_modes_and_shares():
    values = drawn("bimodal:20:800:0.1")
    long = values > 126  # halfway between the modes, in logarithm
    assert long.mean() == pytest.approx(0.1, abs=0.01)
    assert np.median(values[long]) == pytest.approx(800, rel=0.03)
    assert np.median(values[~long]) == pytest.approx(20, rel=0.03)


def test_uniform_and_fixed_keep_their_bounds():
    values = drawn("uniform:10:50")
    assert (values.min(), values.max()) == (10, 50)
    assert values.mean() == pytest.approx(30, rel=0.02)
    assert set(drawn("fixed:5000")) == {5000}  # the default cap is for tails


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_gaps_have_their_rate_and_their_coefficient_of_variation(cv):
    workload = parse_load(f"gamma:cv={cv},n=200000,rate=2").workload(1)
    gaps_s = np.diff(workload.arrival_s)
    assert gaps_s.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


def test_a_seed_says_everything_and_parts_do_not_disturb_each_other():
    first, again = (parse_load("gamma:cv=2,n=100,rate=1").workload(5) for _ in range(2))
    other_in = parse_load("gamma:cv=2,n=100,rate=1;in=uniform:1:9").workload(5)
    for workload in (again, other_in):
        assert (first.arrival_s == workload.arrival_s).all()
        assert (first.output_tokens == workload.output_tokens).all()
    assert (first.prompt_tokens == again.prompt_tokens).all()
    assert (first.prompt_tokens != other_in.prompt_tokens).any()
    assert (parse_load("poisson:n=100").workload(6).output_tokens != first.output_tokens).any()


def test_without_a_rate_only_a_load_gives_it_time():
    workload = parse_load("poisson:n=100").workload(0)
    assert not workload.timed
    assert workload.scaled_to(3.0).timed
