"""What training goes on from: a decoder, or one that is to learn labels, or an encoder that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import parameters
from fastserve_jax.terminal import Bars
from fastserve_jax.text.load import load_reader, load_tokenizer
from fastserve_jax.weights.adapter_arrays import merged
from fastserve_jax.weights.load import ModelFiles, find_encoder, open_model
from fastserve_jax.weights.registry import REGISTRY, Registry

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
    model, arrays, vocab_size = open_arrays(settings.base, cache_dir, dtype_of(settings))
    _compare(data, settings.base, model, vocab_size)
    if isinstance(model, Classifier) or data.facts.kind == "labels":
        taught = Classifier(model.config, model.dtype, settings.remat)
        return _for_labels(settings, data, taught, arrays)
    return replace(model, remat=settings.remat), arrays


def open_teacher(settings: TrainSettings, cache_dir: Path) -> tuple[Model, dict[str, Any]] | None:
    """Raises ConfigError where it is of another kind or vocabulary than the data."""
    name, data = settings.distil.teacher, Dataset(Path(settings.data))
    if not name:
        return None
    model, arrays, vocab_size = open_arrays(name, cache_dir, dtype_of(settings))
    if not isinstance(model, Model) or data.facts.kind != "text":
        raise ConfigError(f"what {name} could teach of {settings.data} is not text: leave it out")
    _compare(data, name, model, vocab_size)
    return model, arrays


def _compare(data: Dataset, name: str, model: Model | Classifier, vocab_size: int) -> None:
    facts, most = data.facts, model.config.max_context
    if vocab_size != facts.vocab_size:
        raise ConfigError(
            f"{data.folder} has a vocabulary of {facts.vocab_size}, {name} one of {vocab_size}: "
            f"prepare it with --tokenizer {name}"
        )
    if facts.context > most:  # an encoder would take its last position for all behind it
        raise ConfigError(
            f"{data.folder} has rows of {facts.context}, and {name} reads {most} tokens: prepare "
            f"it with --context {most}"
        )


def open_arrays(
    reference: str, cache_dir: Path, dtype: Any
) -> tuple[Model | Classifier, dict[str, Any], int]:
    """Of any model, its arrays in float32, and how many tokens its vocabulary has. A registered
    adapter is its parent and what it adds."""
    registry = Registry(cache_dir / REGISTRY)
    version = registry.find(reference)
    if version is not None and registry.is_adapter(version):
        model, arrays, vocab_size = open_arrays(version.parent, cache_dir, dtype)
        assert isinstance(model, Model), "adapters are of decoders"
        return model, merged(registry.path(version), model.config, arrays), vocab_size
    with Bars() as bars:
        encoder = find_encoder(reference, cache_dir, bars.pull)
        if encoder is not None:
            size = load_reader(encoder.path).vocab_size
            return Classifier(encoder.config, dtype), dict(encoder.tensors()), size
        files = open_model(reference, cache_dir, bars.pull)
        bars.opened(files)
    vocab_size = load_tokenizer(files.tokenizer_source).vocab_size
    return Model(files.config, dtype), arrays_of(files), vocab_size


def arrays_of(files: ModelFiles) -> dict[str, Any]:
    """In float32, whatever they are stored in."""
    shapes = {name: leaf.shape for name, leaf in parameters(Model(files.config).empty).items()}
    return {name: array.astype(np.float32) for name, array in files.tensors(shapes)}


def _for_labels(
    settings: TrainSettings, data: Dataset, model: Classifier, arrays: dict[str, Any]
) -> tuple[Classifier, dict[str, Any]]:
    """What it says of labels begins at nothing, unless it knew the same ones."""
    labels = data.facts.labels
    if not labels:
        raise ConfigError(f"{settings.data} has no labels: prepare it with --labels")
    if model.config.labels != labels:
        arrays["classifier.weight"] = np.zeros((len(labels), model.config.hidden_size), np.float32)
        arrays["classifier.bias"] = np.zeros(len(labels), np.float32)
    config = replace(model.config, labels=labels)
    if isinstance(config, ModelConfig) and arrays.pop("head.weight", None) is not None:
        config = replace(config, tied_head=True)  # it writes nothing
    return replace(model, config=config), arrays
