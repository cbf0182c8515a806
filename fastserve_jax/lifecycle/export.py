"""`fastserve models export`: any decoder that is served, as other programs read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
from jax import export
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import Seq2SeqConfig
from fastserve_jax.models.decoder import parameters
from fastserve_jax.models.whole import logits_at, place_alone
from fastserve_jax.terminal import Bars, console
from fastserve_jax.text.to_gguf import gguf_vocabulary
from fastserve_jax.weights.export import write_folder, write_gguf
from fastserve_jax.weights.load import ModelFiles, open_model

from .losses import Model
from .vocabulary import copy_vocabulary
from .writing import writing

_MOST_ONNX_BYTES = 2_000_000_000  # protobuf's bound


def run_export(reference: str, out: Path, cache_dir: Path) -> None:
    """Raises ConfigError where OUT is there already, or the model is of a kind that is not known
    there; ModelFileError."""
    if out.exists():
        raise ConfigError(f"{out} is there already: take another name")
    with Bars() as bars:
        files = open_model(reference, cache_dir, bars.pull)
    if isinstance(files.config, Seq2SeqConfig):
        raise ConfigError(f"{files.name} has an encoder: there is no form that it is exported to")
    with writing(out.parent) as folder:
        _write(folder / out.name, files)
        os.replace(folder / out.name, out)
    console.print(f"{files.name} is in {out}", highlight=False, soft_wrap=True)


def _write(out: Path, files: ModelFiles) -> None:
    if out.suffix == ".gguf":
        source = files.tokenizer_source
        words = gguf_vocabulary(source) if isinstance(source, Path) else dict(source)
        write_gguf(out, files.name, files.config, _parameters(files), words)
    elif out.suffix == ".stablehlo":
        _write_program(out, files)
    elif out.suffix == ".onnx":
        _write_onnx(out, files)
    else:
        write_folder(out, files.config, _in_bf16(_parameters(files)))
        copy_vocabulary(files.tokenizer_source, out)


def _write_program(out: Path, files: ModelFiles) -> None:
    """tokens [rows, n] int32 -> logits [rows, n, vocab_size] float32, its weights inside, for CPUs,
    GPUs and TPUs; jax.export.deserialize reads it."""
    model = Model(files.config, jnp.float32)
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in _parameters(files)}

    def logits(tokens: jax.Array) -> jax.Array:
        return model.logits(arrays, tokens, jnp.zeros_like(tokens))

    shape = export.symbolic_shape("rows, n")
    given = jax.ShapeDtypeStruct(shape, jnp.int32)  # type: ignore[no-untyped-call]
    made = export.export(jax.jit(logits), platforms=("cpu", "cuda", "tpu"))(given)
    out.write_bytes(made.serialize())


def _write_onnx(out: Path, files: ModelFiles) -> None:
    """tokens [n] int32 -> logits [n, vocab_size] float32 of one sequence, its weights inside, by
    jax2onnx."""
    try:
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise ConfigError("ONNX needs jax2onnx: pip install 'fastserve-jax[onnx]'") from error
    if files.config.num_experts:
        raise ConfigError(f"{files.name} is a mixture of experts, which jax2onnx cannot write down")
    model = Model(files.config, jnp.float32)
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in _parameters(files)}
    if (held := sum(array.nbytes for array in arrays.values())) > _MOST_ONNX_BYTES:
        raise ConfigError(f"{files.name} has {held / 1e9:.1f} GB in float32: an .onnx file has 2")

    def logits(tokens: jax.Array) -> jax.Array:
        state = model.filled(arrays)
        return logits_at(model.graph, model.config, state, tokens, place_alone(tokens))

    given = jax.ShapeDtypeStruct(export.symbolic_shape("n"), jnp.int32)  # type: ignore[no-untyped-call]
    made = to_onnx(logits, [given], input_names=["tokens"], output_names=["logits"])
    out.write_bytes(made.SerializeToString())


def _parameters(files: ModelFiles) -> Iterator[tuple[str, NDArray[Any]]]:
    empty = Model(files.config, jnp.float32).empty
    return files.tensors({name: leaf.shape for name, leaf in parameters(empty).items()})


def _in_bf16(
    given: Iterator[tuple[str, NDArray[Any]]],
) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in given:
        yield name, array.astype(ml_dtypes.bfloat16)
