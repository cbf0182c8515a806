"""`fastserve evaluate`: how good a model is, by text that it has not seen.

    text    perplexity and the share of tokens that were expected most, with the passages and tokens
            that were expected least
    labels  accuracy, precision, recall and F1, by scikit-learn, with the errors that say most

By the model's arrays, without a server; answers.py and harness.py ask one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import chain
from math import exp
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError

from .dataset import TRAIN, VALID, Dataset
from .losses import Classifier, Model

_MOST_EXAMPLES = 10
_LEAST_TOKENS = 8  # of a passage that is shown: of fewer the mean says little
_BATCH = 16

type Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Error:
    """A text that was given another label than its own, and how sure the model was of it."""

    row: int
    label: str
    given: str
    share: float


@dataclass(frozen=True, slots=True)
class Passage:
    """A document, or what a row has of it, and its token that was expected least."""

    row: int
    segment: int
    loss: float  # nats for each token
    at: int  # in the row
    nats: float  # of that token


@dataclass(frozen=True, slots=True)
class Found:
    metrics: Mapping[str, float]
    report: str = ""  # by label
    errors: tuple[Error, ...] = field(default=())
    passages: tuple[Passage, ...] = field(default=())


def evaluate(
    model: Model | Classifier,
    arrays: Mapping[str, Any],
    data: Dataset,
    part: str,
    progress: Progress = lambda *_: None,
) -> Found:
    """Raises ConfigError and DataError."""
    if part not in (TRAIN, VALID):
        raise ConfigError(f"part is {TRAIN} or {VALID}, not {part}")
    if not getattr(data.facts, f"{part}_rows"):
        raise ConfigError(f"{data.folder} has nothing in {part}: prepare it with --holdout")
    says = "labels" if isinstance(model, Classifier) else "text"
    if data.facts.kind != says:
        raise ConfigError(f"{data.folder} has {data.facts.kind}, and what the model says is {says}")
    if isinstance(model, Classifier):
        return _labels(model, arrays, data, part, progress)
    return _text(model, arrays, data, part, progress)


def _text(
    model: Model, arrays: Mapping[str, Any], data: Dataset, part: str, progress: Progress
) -> Found:
    run = jax.jit(model.each)
    nats, tokens, right, done = 0.0, 0, 0, 0
    worst: list[Passage] = []
    rows = getattr(data.facts, f"{part}_rows")
    for batch in data.batches(part, _BATCH, None):
        own = len(batch["tokens"])
        made = run(arrays, _filled(batch, _BATCH - own, "learned"))
        each, counts, hits = (np.asarray(one)[:own] for one in made)
        nats += float(each.sum(dtype=np.float64))
        tokens, right = tokens + int(counts.sum()), right + int(hits.sum())
        passages = _passages(each, counts, batch["segments"][:, 1:], done)
        worst = nlargest(_MOST_EXAMPLES, chain(worst, passages), lambda one: one.loss)
        progress(done := done + own, rows)
    mean = nats / max(1, tokens)
    metrics = {"loss": mean, "perplexity": exp(mean), "accuracy": right / max(1, tokens)}
    return Found(metrics, passages=tuple(worst))


def _passages(
    nats: NDArray[Any], counts: NDArray[Any], segments: NDArray[Any], first: int
) -> Iterator[Passage]:
    """[rows, n - 1] each, of rows from `first` on and the tokens behind their first."""
    for row in range(len(nats)):
        for segment in np.unique(segments[row][counts[row]]):
            own = np.flatnonzero(counts[row] & (segments[row] == segment))
            if len(own) >= _LEAST_TOKENS:
                least = own[nats[row][own].argmax()]
                loss, most = float(nats[row][own].mean()), float(nats[row][least])
                yield Passage(first + row, int(segment), loss, int(least) + 1, most)


def _labels(
    model: Classifier, arrays: Mapping[str, Any], data: Dataset, part: str, progress: Progress
) -> Found:
    from sklearn.metrics import accuracy_score, classification_report
    from sklearn.metrics import precision_recall_fscore_support as scores

    if model.config.labels != data.facts.labels:
        raise ConfigError(
            f"{data.folder} has other labels than the model was taught: "
            f"{', '.join(data.facts.labels[:5])}, ... and {', '.join(model.config.labels[:5])}, ..."
        )
    run = jax.jit(model.logits)
    logits: list[NDArray[np.float32]] = []
    rows = getattr(data.facts, f"{part}_rows")
    for batch in data.batches(part, _BATCH, None):
        own = len(batch["tokens"])
        logits += [*np.asarray(run(arrays, _filled(batch, _BATCH - own, "lengths")))[:own]]
        progress(len(logits), rows)
    shares = _softmax(np.stack(logits))
    wanted, given = data.arrays(part)["labels"], shares.argmax(1)
    precision, recall, f1, _ = scores(wanted, given, average="macro", zero_division=0)
    # Of those that occur, as the means are.
    names = [model.config.labels[number] for number in np.union1d(wanted, given)]
    report = classification_report(wanted, given, target_names=names, zero_division=0)
    metrics = {
        "accuracy": float(accuracy_score(wanted, given)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }
    return Found(metrics, report, _worst(shares, wanted, model.config.labels))


def _worst(
    shares: NDArray[np.float32], wanted: NDArray[np.int32], labels: tuple[str, ...]
) -> tuple[Error, ...]:
    """The surest of those that are wrong."""
    given = shares.argmax(1)
    wrong = np.flatnonzero(given != wanted)
    sure = wrong[np.argsort(-shares[wrong, given[wrong]])][:_MOST_EXAMPLES]
    return tuple(
        Error(int(row), labels[wanted[row]], labels[given[row]], float(shares[row, given[row]]))
        for row in sure
    )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    raised: NDArray[np.float32] = np.exp(logits - logits.max(1, keepdims=True))
    shares: NDArray[np.float32] = raised / raised.sum(1, keepdims=True)
    return shares


def _filled(batch: Mapping[str, Any], rows: int, what: str) -> dict[str, Any]:
    """With rows that count for nothing, so that there is one program."""
    return {
        name: np.concatenate([array, array[:1].repeat(rows, axis=0) * (name != what)])
        for name, array in batch.items()
    }


def text_of(data: Dataset, part: str, row: int) -> list[int]:
    """Tokens of a labelled text."""
    arrays = data.arrays(part)
    return [int(id) for id in arrays["tokens"][row][: arrays["lengths"][row]]]


def passage_of(data: Dataset, part: str, passage: Passage) -> tuple[list[int], list[int]]:
    """Its tokens before the one that was expected least, and from there on."""
    arrays = data.arrays(part)
    own = arrays["segments"][passage.row] == passage.segment
    tokens, at = arrays["tokens"][passage.row], np.arange(len(own))
    before, behind = (tokens[own & side] for side in (at < passage.at, at >= passage.at))
    return before.tolist(), behind.tolist()
