"""What a teacher expects is learned: the loss is the formula's, and the teacher stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.lifecycle import origin
from fastserve_jax.lifecycle.distil import Distil, distilled
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.lifecycle.origin import open_teacher
from fastserve_jax.lifecycle.train import points, train
from tests.lifecycle import runs
from tests.lifecycle.compress import tiny

TEACHER = tiny.config()
STUDENT = dataclasses.replace(TEACHER, num_layers=1, intermediate_size=32)


def batch():
    tokens = np.random.default_rng(0).integers(0, 64, (3, 20))
    learned = np.arange(20) > np.array([[0], [5], [10]])
    return {"tokens": tokens, "segments": np.zeros_like(tokens), "learned": learned}


def numbers(config, seed):
    return {name: jnp.asarray(array) for name, array in tiny.arrays(config, seed).items()}


def shares(logits):
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.5), (1.0, 1.0), (4.0, 0.0)])
def test_the_loss_is_the_formula(temperature, alpha):
    given = {name: jnp.asarray(array) for name, array in batch().items()}
    own, taught = numbers(STUDENT, 1), numbers(TEACHER, 2)
    models = Model(STUDENT), Model(TEACHER)
    asked = Distil("teacher", temperature, alpha)
    found, (count, _) = distilled(*models, own, taught, given, asked)
    student, teacher = (
        np.asarray(model.logits(arrays, given["tokens"], given["segments"]), np.float64)[:, :-1]
        for model, arrays in zip(models, (own, taught), strict=True)
    )
    p, q = shares(teacher / temperature), shares(student / temperature)
    soft = temperature**2 * (p * np.log(p / q)).sum(-1)
    target = batch()["tokens"][:, 1:, None]
    hard = -np.log(np.take_along_axis(shares(student), target, -1))[..., 0]
    counts = batch()["learned"][:, 1:]
    assert count == counts.sum()
    assert found == pytest.approx((alpha * soft + (1 - alpha) * hard)[counts].sum(), rel=1e-4)
    slope = jax.grad(lambda taught: distilled(*models, own, taught, given, asked)[0])(taught)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_training_goes_towards_the_teacher_and_is_measured_by_the_text(tmp_path):
    config = tiny.config(vocab_size=300)
    teacher = Model(config), {n: np.asarray(a) for n, a in numbers(config, 3).items()}
    changes = {"distil.teacher": "it", "distil.alpha": 1.0, "distil.temperature": 1.0}
    train(runs.settings(runs.data(tmp_path), tmp_path / "run", **changes), teacher=teacher)
    curve = list(points(tmp_path / "run"))
    assert curve[-1].loss < 0.95 * curve[0].loss < 1
    assert curve[-1].valid_loss > 5  # a teacher that knows nothing teaches nothing of the text


def test_a_teacher_of_another_vocabulary_or_of_less_context_is_named(tmp_path, monkeypatch):
    data = runs.data(tmp_path)
    asked = runs.settings(data, tmp_path / "run", **{"distil.teacher": "tiny"})
    with pytest.raises(ConfigError, match="a vocabulary of 300, tiny one of 1024"):
        open_teacher(asked, tmp_path)
    short = Model(tiny.config(vocab_size=300, max_context=32)), {}, 300
    monkeypatch.setattr(origin, "open_arrays", lambda *_: short)
    with pytest.raises(ConfigError, match="rows of 48, and tiny reads 32 tokens: prepare it with"):
        open_teacher(asked, tmp_path)
    assert open_teacher(runs.settings(data, tmp_path / "run"), tmp_path) is None
    with pytest.raises(ConfigError, match="temperature is more than 0"):
        Distil(temperature=0)
