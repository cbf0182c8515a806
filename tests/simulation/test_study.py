"""`fastserve simulate` as a person types it: table, JSON, and one line for what is wrong."""

import importlib.util
import json

import pytest

from fastserve_jax.cli import app, main
from tests.simulation.test_measures import KEYS

LOAD = "gamma:cv=2,n=60;in=lognormal:40:0.5;out=lognormal:30:0.8:200"


def simulate(*words):
    """The command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(lambda: app(["simulate", "--jobs", "1", *map(str, words)]))
    return ended.value.code or 0


def test_a_study_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ("--load", LOAD, "--rho", "0.7,1.1", "--seeds", 2, "--slots", 4, "--json", path)
    assert simulate(*words, "--policy", "run-to-completion,fcfs") == 0
    rows = json.loads(path.read_text())
    assert [list(row) for row in rows] == [KEYS] * 8
    assert {(row["policy"], row["rho"], row["seed"]) for row in rows} == {
        (policy, rho, seed)
        for policy in ("run-to-completion", "fcfs")
        for rho in (0.7, 1.1)
        for seed in (0, 1)
    }
    assert {row["load"] for row in rows} == {LOAD}
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "60 requests, 4 slots" in shown.out
    assert "FCFS completes" in shown.out
    lines = [line.split() for line in shown.out.splitlines()]

    def mean_s(policy):
        found = [r["jct_mean_s"] for r in rows if (r["policy"], r["rho"]) == (policy, 1.1)]
        return sum(found) / len(found)

    assert any(line[:3] == ["fcfs", "1.1", f"{mean_s('fcfs'):.2f}"] for line in lines)
    ratio = mean_s("fcfs") / mean_s("run-to-completion")
    assert ratio < 0.9
    assert any(line[:1] == [f"{ratio:.2f}x"] for line in lines)
    assert "held up to rho: run-to-completion" in shown.out


def test_a_trace_and_what_is_missing_from_the_table(tmp_path, capsys):
    rows = "".join(f"{i},{40 + i},{20 if i % 5 else 0},c{i % 2}\n" for i in range(30))
    (tmp_path / "t.csv").write_text(
        "time,input_tokens,output_tokens,client\n" + rows + "30,900,9,x"
    )
    path = tmp_path / "rows.json"
    words = ("--trace", tmp_path / "t.csv", "--pages", 10, "--slots", 2, "--until", 8)
    assert simulate(*words, "--policy", "mlfq", "--json", path) == 0
    shown = capsys.readouterr().out
    assert "6 rows of the trace ask for no output and were dropped" in shown
    assert "1 requests could never fit the pool" in shown
    assert "of 24 requests did not finish" in shown
    (row,) = json.loads(path.read_text())
    assert row["load"] == "t"
    assert row["rho"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "neither is there: give one"),
        (("--load", LOAD, "--trace", "x.csv", "--rho", "1"), "both are there: give one"),
        (("--load", LOAD), "give --rho 0.9, or rate= in the load"),
        (("--load", LOAD, "--rho", "0.7,high"), "--rho high"),
        (("--load", LOAD, "--rho", "0"), "--rho 0"),
        (("--load", LOAD, "--rho", "1", "--policy", "fcfs,best"), "no policy 'best'"),
        (("--load", LOAD, "--rho", "1", "--policy", ","), "--policy is empty"),
        (("--load", LOAD, "--rho", "1", "--slots", "0"), "--slots is 0"),
        (("--load", LOAD, "--rho", "1", "--seeds", "0"), "--seeds is 0"),
        (("--load", LOAD, "--rho", "1", "--until", "0"), "--until is 0"),
        (("--load", LOAD, "--rho", "1", "--device", "h200"), "no device 'h200'"),
        (("--load", LOAD, "--rho", "1", "--pages", "1"), "raise --pages"),
        (("--load", LOAD, "--rho", "1", "--json", "/no/such/x.json"), "there is no folder"),
        (("--load", "poisson:n=x", "--rho", "1"), "'n=x'"),
        (("--trace", "/no/such.csv"), "/no/such.csv"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(words, said, capsys):
    assert simulate(*words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("fastserve: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_what_is_wrong_with_the_requests_is_said_before_anything_is_made(tmp_path, capsys):
    words = ("--load", LOAD, "--rho", "1", "--pages", 1, "--pictures", tmp_path / "p")
    assert simulate(*words) == 2
    assert "raise --pages" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_pictures_without_matplotlib_say_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ("--load", LOAD, "--rho", "1", "--pictures", tmp_path / "p")
    assert simulate(*words) == 2
    assert "pip install 'fastserve-jax[pictures]'" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
