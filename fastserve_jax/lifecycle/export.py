"""`fastserve models export`: any decoder that is served, as other programs read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.decoder import parameters
from fastserve_jax.terminal import Bars, console
from fastserve_jax.text.to_gguf import gguf_vocabulary
from fastserve_jax.weights.export import write_folder, write_gguf
from fastserve_jax.weights.load import ModelFiles, open_model

from .losses import Model
from .vocabulary import copy_vocabulary


def run_export(reference: str, out: Path, cache_dir: Path) -> None:
    """Raises ConfigError where OUT is there already, or the model is of a kind that is not known
    there; ModelFileError."""
    if out.exists():
        raise ConfigError(f"{out} is there already: take another name")
    with Bars() as bars:
        files = open_model(reference, cache_dir, bars.pull)
    if out.suffix == ".gguf":
        source = files.tokenizer_source
        words = gguf_vocabulary(source) if isinstance(source, Path) else dict(source)
        write_gguf(out, files.name, files.config, _parameters(files), words)
    else:
        write_folder(out, files.config, _in_bf16(_parameters(files)))
        copy_vocabulary(files.tokenizer_source, out)
    console.print(f"{files.name} is in {out}", highlight=False, soft_wrap=True)


def _parameters(files: ModelFiles) -> Iterator[tuple[str, NDArray[Any]]]:
    empty = Model(files.config, jnp.float32).empty
    return files.tensors({name: leaf.shape for name, leaf in parameters(empty).items()})


def _in_bf16(
    given: Iterator[tuple[str, NDArray[Any]]],
) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in given:
        yield name, array.astype(ml_dtypes.bfloat16)
