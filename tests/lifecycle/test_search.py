"""Searches find what is better, remember what they tried, and survive a trial that fails."""

import math

import pytest

from fastserve_jax.errors import ConfigError, TrainingFailed
from fastserve_jax.lifecycle.search import Range, Search, search
from fastserve_jax.lifecycle.settings import TrainSettings
from fastserve_jax.lifecycle.train import Point, Trained

SPACE = {"optimiser.learning_rate": Range(1e-5, 1e-1, log=True), "batch_rows": [8, 16, 32]}

GRID = {"batch_rows": [8, 16, 32]}


def point(step, valid_loss):
    return Point(step, valid_loss, 0.0, 0.0, 0.0, 0.0, valid_loss, 0.0)


class Trainer:
    """A loss that is least at a rate of .003 and 16 rows."""

    def __init__(self, fails=(), stops=None):
        self.runs, self.fails, self.stops, self.given_up = [], fails, stops, 0

    def __call__(self, chosen, folder, report):
        self.runs.append(dict(chosen))
        assert not folder.exists()
        (folder / "checkpoints").mkdir(parents=True)
        if len(self.runs) - 1 == self.stops:
            raise KeyboardInterrupt
        if len(self.runs) - 1 in self.fails:
            raise TrainingFailed("no number")
        rate = chosen.get("optimiser.learning_rate", 0.003)
        loss = (math.log10(rate) - math.log10(0.003)) ** 2 + (chosen["batch_rows"] != 16)
        for step in range(1, 5):
            try:
                report(point(step, loss + 1 / step))
            except BaseException:
                self.given_up += 1
                raise
        return Trained(4, 4, loss, folder)


@pytest.mark.parametrize("method", ["bayesian", "random"])
def test_the_best_is_near_the_least(tmp_path, method):
    trainer, told = Trainer(), []
    settings = TrainSettings(out=str(tmp_path / "s"))
    best = search(Search(method, 30, SPACE), settings, trainer, told.append)
    assert len(trainer.runs) == len(told) == 30
    ended = [tried.valid_loss for tried in told if tried.valid_loss is not None]
    assert best.valid_loss == min(ended) < 0.5
    assert best.settings["batch_rows"] == 16
    assert trainer.given_up == sum(tried.valid_loss is None for tried in told) > 0
    assert best.settings == trainer.runs[best.number]


def test_a_grid_is_gone_through(tmp_path):
    trainer = Trainer()
    settings = TrainSettings(out=str(tmp_path / "s"))
    best = search(Search("grid", 20, GRID), settings, trainer, lambda _: 0)
    assert sorted(run["batch_rows"] for run in trainer.runs) == [8, 16, 32]
    assert best.settings == {"batch_rows": 16}


@pytest.mark.parametrize("method", ["bayesian", "random"])
def test_it_goes_on_where_it_was_with_other_numbers(tmp_path, method):
    settings = TrainSettings(out=str(tmp_path / "s"))
    first, second = Trainer(), Trainer()
    search(Search(method, 5, SPACE), settings, first, lambda _: 0)
    search(Search(method, 12, SPACE), settings, second, lambda _: 0)
    assert (len(first.runs), len(second.runs)) == (5, 7)
    assert not any(run in first.runs for run in second.runs)
    with pytest.raises(ConfigError, match=r"of another search\.space"):
        search(Search(method, 13, {"batch_rows": [8]}), settings, second, lambda _: 0)


def test_what_a_person_stops_is_no_trial(tmp_path):
    settings, asked = TrainSettings(out=str(tmp_path / "s")), Search("grid", 20, GRID)
    first, second, third = Trainer(stops=1), Trainer(), Trainer()
    with pytest.raises(KeyboardInterrupt):
        search(asked, settings, first, lambda _: 0)
    assert search(asked, settings, second, lambda _: 0).settings == {"batch_rows": 16}
    ended = [run["batch_rows"] for run in (first.runs[0], *second.runs)]
    assert sorted(ended) == [8, 16, 32]
    assert search(asked, settings, third, lambda _: 0).settings == {"batch_rows": 16}
    assert not third.runs
    assert not list((tmp_path / "s").glob("*/checkpoints"))


def test_whole_numbers_are_drawn_between_whole_ends(tmp_path):
    trainer, space = Trainer(), {"batch_rows": Range(8, 32)}
    search(Search("random", 3, space), TrainSettings(out=str(tmp_path / "s")), trainer, id)
    assert all(isinstance(run["batch_rows"], int) for run in trainer.runs)


def test_a_trial_that_fails_is_no_end(tmp_path):
    trainer, told = Trainer(fails=(0, 2)), []
    settings = TrainSettings(out=str(tmp_path / "s"))
    best = search(Search("random", 4, SPACE), settings, trainer, told.append)
    assert [told[i].valid_loss for i in (0, 2)] == [None, None]
    assert best.valid_loss is not None
    settings = TrainSettings(out=str(tmp_path / "t"))
    with pytest.raises(TrainingFailed, match="none of 2 trials"):
        search(Search("random", 2, SPACE), settings, Trainer(fails=(0, 1)), lambda _: 0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (Search("magic", 3, SPACE), "no method magic: there are bayesian, random, grid"),
        (Search("random", 3, {}), "space is empty"),
        (Search("grid", 3, SPACE), "no ranges"),
        (Search("random", 3, {"seed": []}), "seed has nothing to try"),
        (Search("random", 3, {"seed": Range(2, 1)}), "low below high"),
        (Search("random", 3, {"seed": Range(0, 1, log=True)}), "above 0 where it is log"),
    ],
)
def test_searches_that_cannot_be(tmp_path, what, reason):
    with pytest.raises(ConfigError, match=reason):
        search(what, TrainSettings(out=str(tmp_path / "s")), Trainer(), lambda _: 0)
    assert not (tmp_path / "s").exists()
