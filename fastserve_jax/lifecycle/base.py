"""What training goes on from: a decoder, or an encoder that is to learn labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.decoder import parameters
from fastserve_jax.terminal import Bars
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.wordpiece import load_wordpiece
from fastserve_jax.weights.encoder import EncoderFiles
from fastserve_jax.weights.load import find_encoder, open_model

from .dataset import Dataset
from .losses import Classifier, Model
from .settings import TrainSettings
from .train import dtype_of


def tokenizer_of(reference: str, cache_dir: Path) -> Path | Mapping[str, object]:
    with Bars() as bars:
        encoder = find_encoder(reference, cache_dir, bars.pull)
        if encoder is not None:
            return encoder.path
        return open_model(reference, cache_dir, bars.pull).tokenizer_source


def open_base(
    settings: TrainSettings, cache_dir: Path
) -> tuple[Model | Classifier, dict[str, Any]]:
    """Raises ConfigError where the data is of another vocabulary, or teaches something else."""
    data = Dataset(Path(settings.data))
    with Bars() as bars:
        encoder = find_encoder(settings.base, cache_dir, bars.pull)
        if encoder is not None:
            _check_vocabulary(settings, data, load_wordpiece(encoder.path).vocab_size)
            return _classifier(settings, data, encoder)
        files = open_model(settings.base, cache_dir, bars.pull)
        bars.opened(files)
    if data.facts.kind != "text":
        raise ConfigError(f"{settings.data} has labels, and {settings.base} is no encoder")
    _check_vocabulary(settings, data, load_tokenizer(files.tokenizer_source).vocab_size)
    model = Model(files.config, dtype_of(settings), settings.remat)
    shapes = {name: leaf.shape for name, leaf in parameters(model.empty).items()}
    return model, {n: a.astype(np.float32) for n, a in files.tensors(shapes)}


def _check_vocabulary(settings: TrainSettings, data: Dataset, own: int) -> None:
    known = data.facts.vocab_size
    if own != known:
        raise ConfigError(
            f"{settings.data} has a vocabulary of {known}, {settings.base} one of {own}: prepare "
            f"it with --tokenizer {settings.base}"
        )


def _classifier(
    settings: TrainSettings, data: Dataset, encoder: EncoderFiles
) -> tuple[Classifier, dict[str, Any]]:
    """What it says of labels begins at nothing, unless it knew the same ones."""
    labels = data.facts.labels
    if not labels:
        raise ConfigError(f"{settings.data} has no labels: prepare it with --labels")
    arrays = dict(encoder.tensors())
    if encoder.config.labels != labels:
        size = encoder.config.hidden_size
        arrays["classifier.weight"] = np.zeros((len(labels), size), np.float32)
        arrays["classifier.bias"] = np.zeros(len(labels), np.float32)
    return Classifier(replace(encoder.config, labels=labels), dtype_of(settings)), arrays
