"""An encoder made ready to serve: its arrays, every program compiled, and what takes texts in turn.
Touches no event loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from fastserve_jax.config import Settings
from fastserve_jax.encoding import Encodings
from fastserve_jax.models.decoder import fill
from fastserve_jax.models.encoder import EncoderConfig, abstract_encoder
from fastserve_jax.runtime.compile import keep_compiled
from fastserve_jax.runtime.encoder import EncoderRunner
from fastserve_jax.terminal import console
from fastserve_jax.text.wordpiece import WordPiece, load_wordpiece
from fastserve_jax.weights.encoder import EncoderFiles

_MAX_TEXTS = 64  # in a step, of
_STEP_TOKENS = 2048  # at the most, padding included
_MAX_QUEUE = 2048  # texts, of which one request may bring as many


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    name: str
    config: EncoderConfig
    words: WordPiece
    encodings: Encodings  # not entered yet


def load_encoder(files: EncoderFiles, settings: Settings, cache_dir: Path) -> LoadedEncoder:
    """Raises ModelFileError."""
    keep_compiled(cache_dir / "compiled")
    encodings = Encodings(
        _runner(files, settings),
        max_texts=_MAX_TEXTS,
        step_tokens=_STEP_TOKENS,
        max_queue=max(settings.engine.max_queue, _MAX_QUEUE),
    )
    return LoadedEncoder(files.name, files.config, load_wordpiece(files.path), encodings)


def _runner(files: EncoderFiles, settings: Settings) -> EncoderRunner:
    on_cpu = jax.default_backend() == "cpu"
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}.get(
        settings.model.dtype, jnp.float32 if on_cpu else jnp.bfloat16
    )
    graph, empty = abstract_encoder(files.config, dtype)
    state = fill(empty, {name: jnp.asarray(array, dtype) for name, array in files.tensors()})
    runner = EncoderRunner(
        graph, files.config, state, max_texts=_MAX_TEXTS, step_tokens=_STEP_TOKENS
    )
    with console.status("compiling") as status:
        runner.warm_up(lambda done, of: status.update(f"compiling: {done} of {of}"))
    return runner
