"""Measures against what a person would count."""

import csv
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.lifecycle.dataset import Dataset
from fastserve_jax.lifecycle.evaluate import Found, evaluate, passage_of
from fastserve_jax.lifecycle.losses import Classifier, Model
from fastserve_jax.lifecycle.measured import _show
from fastserve_jax.lifecycle.prepare import Wanted, prepare
from fastserve_jax.lifecycle.train import drawn
from fastserve_jax.models.encoder import EncoderConfig
from tests.lifecycle import runs
from tests.lifecycle.words import write_words
from tests.models.test_encoder import drawn as drawn_encoder

LABELS = ("bad", "fine", "good")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Dataset(runs.data(tmp_path_factory.mktemp("data")))


def test_perplexity_is_of_each_token_that_counts(text):
    shape = runs.settings(text.folder, "nowhere").shape
    config = shape.config(text.facts.vocab_size, text.facts.context)
    model, arrays = Model(config), drawn(config, 0)
    found = evaluate(model, arrays, text, "valid")
    nats, right, count = 0.0, 0, 0
    data, each = text.arrays("valid"), {}
    for number, (tokens, segments, learned) in enumerate(zip(*data.values(), strict=True)):
        given = jnp.asarray(tokens, jnp.int32)[None], jnp.asarray(segments, jnp.int32)[None]
        logits = np.asarray(model.logits(arrays, *given)[0], np.float64)
        for at in range(1, len(tokens)):
            if learned[at] and segments[at] == segments[at - 1]:
                row = logits[at - 1]
                own = np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[at]]
                each.setdefault((number, segments[at]), []).append((own, at))
                nats += own
                right += int(row.argmax() == tokens[at])
                count += 1
    assert found.metrics["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found.metrics["accuracy"] == pytest.approx(right / count)
    long = {key: own for key, own in each.items() if len(own) >= 8}
    wanted = sorted(long, key=lambda key: -np.mean([nats for nats, _ in long[key]]))[:10]
    assert [(one.row, one.segment) for one in found.passages] == wanted
    for one in found.passages:
        own = long[one.row, one.segment]
        assert one.loss == pytest.approx(np.mean([nats for nats, _ in own]), rel=1e-5)
        assert (one.nats, one.at) == (pytest.approx(max(own)[0], rel=1e-5), max(own)[1])
        before, behind = passage_of(text, "valid", one)
        assert behind[0] == data["tokens"][one.row][one.at]
        assert one.at - len(before) == np.flatnonzero(data["segments"][one.row] == one.segment)[0]
    with pytest.raises(ConfigError, match="train or valid, not all"):
        evaluate(model, arrays, text, "all")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    words = ("the cat sat", "a dog", "good dog", "bad cat", "the mat did not", "a cat and a dog")
    with (folder / "a.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        for number in range(36):
            table.writerow((f"{words[number % 6]} {' on' * (number // 6)}", LABELS[number % 3]))
    write_words(folder, 100)
    prepare([folder / "a.csv"], folder / "data", Wanted(16, "", 0.0, "labels"), folder)
    return Dataset(folder / "data")


def classifier(labels=LABELS):
    config = EncoderConfig(100, 32, 2, 4, 64, 24, 1e-12, labels=labels)
    return Classifier(config), {
        n: jnp.asarray(a, jnp.float32) for n, a in drawn_encoder(config).items()
    }


def test_labels_are_counted_and_the_surest_errors_told(labelled):
    model, arrays = classifier()
    found = evaluate(model, arrays, labelled, "train")
    data = labelled.arrays("train")
    logits = np.asarray(model.logits(arrays, {n: jnp.asarray(a) for n, a in data.items()}))
    given, wanted = logits.argmax(1), data["labels"]
    assert found.metrics["accuracy"] == pytest.approx((given == wanted).mean())
    recall = [(given[wanted == k] == k).mean() for k in range(3)]
    precision = [(wanted[given == k] == k).mean() if (given == k).any() else 0 for k in range(3)]
    assert found.metrics["recall"] == pytest.approx(np.mean(recall))
    assert found.metrics["precision"] == pytest.approx(np.mean(precision))
    assert all(label in found.report for label in LABELS)
    assert len(found.errors) == min(10, (given != wanted).sum())
    shares = [error.share for error in found.errors]
    assert shares == sorted(shares, reverse=True)
    for error in found.errors:
        assert LABELS[wanted[error.row]] == error.label != error.given == LABELS[given[error.row]]


def test_a_label_that_does_not_occur_has_no_part_in_the_means(labelled):
    model, arrays = classifier((*LABELS, "never"))
    arrays["classifier.bias"] = jnp.asarray([0.0, 0.0, 0.0, -1e9])
    data = Dataset(labelled.folder)
    data.facts = replace(data.facts, labels=(*LABELS, "never"))
    found = evaluate(model, arrays, data, "train")
    means = next(line for line in found.report.splitlines() if "macro avg" in line).split()[2:5]
    assert [f"{found.metrics[m]:.2f}" for m in ("precision", "recall", "f1")] == means


def test_what_is_said_is_printed_as_it_is(capsys):
    report = f"[spam] [/x] {'1.00  ' * 30}"
    _show({"[b]f1": 0.5}, Found({}), False, (), report)
    told = capsys.readouterr().out
    assert report.strip() in told
    assert "[b]f1" in told


def test_text_and_labels_are_not_measured_as_each_other(text, labelled):
    config = runs.settings(text.folder, "nowhere").shape.config(100, 16)
    for model, data, said in (
        (Model(config), labelled, "has labels, and what the model says is text"),
        (classifier()[0], text, "has text, and what the model says is labels"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate(model, {}, data, "train")


def test_other_labels_are_refused(labelled):
    model, arrays = classifier(("a", "b", "c"))
    with pytest.raises(ConfigError, match="other labels than the model was taught"):
        evaluate(model, arrays, labelled, "train")
    with pytest.raises(ConfigError, match="nothing in valid"):
        evaluate(*classifier(), labelled, "valid")
