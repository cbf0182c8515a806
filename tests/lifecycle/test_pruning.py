"""Pruning during training: as much as the schedule says, for good; and zeros that stay zero."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.lifecycle.origin import arrays_of
from fastserve_jax.lifecycle.pruning import Prune, pruned
from fastserve_jax.lifecycle.train import points, train
from fastserve_jax.weights.load import open_folder
from tests.lifecycle import runs

NAME = "layers.0.mlp.down.weight"


def followed(prune, steps, begin):
    """The arrays after each step of gradients that would move every number."""
    optimiser = pruned(optax.sgd(0.1), prune, steps)
    params, rng = begin, np.random.default_rng(0)
    state, after = optimiser.init(params), []
    for _ in range(steps):
        slope = {n: jnp.asarray(rng.standard_normal(a.shape), a.dtype) for n, a in params.items()}
        updates, state = optimiser.update(slope, state, params)
        params = optax.apply_updates(params, updates)
        after.append({n: np.asarray(a) for n, a in params.items()})
    return after


def test_the_share_grows_as_it_says_and_what_is_gone_stays():
    drawn = np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32)
    begin = {NAME: jnp.asarray(drawn), "embed.weight": jnp.asarray(drawn)}
    prune = Prune(share=0.6, begin=2, end=10, every=2)
    after = followed(prune, 14, begin)
    for step, arrays in enumerate(after, 1):
        due = min(step - step % 2, 10)
        share = 0.6 * (1 - (1 - max(0, due - 2) / 8) ** 3)
        assert (arrays[NAME] == 0).mean() == pytest.approx(share, abs=1e-3), step
        assert not (arrays["embed.weight"] == 0).any()
    for one, other in pairwise(after):
        assert not other[NAME][one[NAME] == 0].any()
    # Those that went were the smallest there were.
    before, now = np.abs(after[8][NAME]), after[9][NAME]
    assert before[now == 0].mean() < 0.5 * before[now != 0].mean()


def test_zeros_that_were_there_stay():
    drawn = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    drawn[::2] = 0
    after = followed(Prune(keep=True), 3, {NAME: jnp.asarray(drawn), "embed.weight": drawn * 1})
    assert np.array_equal(after[-1][NAME] == 0, drawn == 0)
    assert after[-1]["embed.weight"].all()
    assert not np.allclose(after[-1][NAME][1::2], drawn[1::2])


def test_the_model_that_is_kept_is_a_sparse_one(tmp_path):
    data = runs.data(tmp_path)
    much = {"prune.share": 0.98, "prune.begin": 15, "prune.end": 18, "prune.every": 1, "keep": 1}
    few = {"steps": 20, "evaluate_every": 2, "optimiser.learning_rate": 3e-2}
    done = train(runs.settings(data, tmp_path / "run", **much, **few))
    arrays = arrays_of(open_folder(done.folder, "model"))
    measured = {p.step: p.valid_loss for p in points(tmp_path / "run") if p.valid_loss}
    assert min(measured.values()) < done.valid_loss == min(measured[18], measured[20])
    assert (arrays[NAME] == 0).mean() == pytest.approx(0.98, abs=0.01)
    assert (arrays["embed.weight"] == 0).mean() < 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune.share": 1.0}, "less than 1"),
        ({"prune.share": 0.5, "prune.end": 99}, "from step 0 to 99 of 12 there are none"),
        ({"prune.keep": True}, "zeros of a base"),
        ({"prune.share": 0.5, "lora.rank": 2, "base": "tiny"}, "not both"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        train(runs.settings(tmp_path, tmp_path / "run", **changes))
