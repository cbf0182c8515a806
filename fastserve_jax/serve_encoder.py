"""`fastserve serve` of an encoder, or of a decoder that says labels: the same server, and a loop
that takes texts in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fastserve_jax.config import Settings
from fastserve_jax.encoding import Encodings
from fastserve_jax.metrics import Metrics
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import fill
from fastserve_jax.models.encoder import EncoderConfig, abstract_encoder
from fastserve_jax.models.labeller import abstract_labeller
from fastserve_jax.runtime.compile import CompileCounter, keep_compiled
from fastserve_jax.runtime.encoder import EncoderRunner
from fastserve_jax.server.lifecycle import serve
from fastserve_jax.server.state import ServedEncoder, ServerState
from fastserve_jax.terminal import console
from fastserve_jax.text.load import load_reader
from fastserve_jax.weights.encoder import EncoderFiles

_MAX_TEXTS = 64  # in a step, of
_STEP_TOKENS = 2048  # at the most, padding included


async def serve_encoder(
    files: EncoderFiles, settings: Settings, cache_dir: Path, began: float
) -> int:
    """Serve until a signal. Returns the exit status; raises OperatorErrors."""
    stop = asyncio.Event()
    metrics = Metrics(files.name)
    state = ServerState(settings.server, metrics)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(state, url.set_result, stop), name="server")
    try:
        opening: set[asyncio.Future[bool] | asyncio.Future[str]] = {server, url}
        await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()  # raises what kept it from listening
        keep_compiled(cache_dir / "compiled")
        runner = await asyncio.to_thread(_runner, files, settings)
        loop = Encodings(
            runner,
            max_texts=_MAX_TEXTS,
            step_tokens=_STEP_TOKENS,
            max_queue=max(settings.engine.max_queue, 2048),
        )
        with CompileCounter() as counter:
            async with loop:
                metrics.observe(_numbers(loop, counter, time.perf_counter() - began))
                config = files.config
                words = load_reader(files.path)
                shape = (_context(config), config.hidden_size, config.labels)
                state.ready(ServedEncoder(files.name, loop, words, *shape))
                console.print(_ready(files, await url, time.perf_counter() - began), soft_wrap=True)
                finished = await server
        return 0 if finished else 1
    finally:
        stop.set()
        await asyncio.wait({server})


def _runner(files: EncoderFiles, settings: Settings) -> EncoderRunner:
    on_cpu = jax.default_backend() == "cpu"
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}.get(
        settings.model.dtype, jnp.float32 if on_cpu else jnp.bfloat16
    )
    graph, empty = _abstract(files.config, dtype)
    state = fill(empty, {name: jnp.asarray(array, dtype) for name, array in files.tensors()})
    config = replace(files.config, max_context=_context(files.config))
    runner = EncoderRunner(graph, config, state, max_texts=_MAX_TEXTS, step_tokens=_STEP_TOKENS)
    with console.status("compiling") as status:
        runner.warm_up(lambda done, of: status.update(f"compiling: {done} of {of}"))
    return runner


def _context(config: EncoderConfig | ModelConfig) -> int:
    """Tokens of a text: no more than a step has, though many a decoder could read more."""
    return min(config.max_context, _STEP_TOKENS)


def _abstract(config: EncoderConfig | ModelConfig, dtype: DTypeLike) -> tuple[Any, Any]:
    if isinstance(config, EncoderConfig):
        return abstract_encoder(config, dtype)
    return abstract_labeller(config, dtype)


def _numbers(
    loop: Encodings, counter: CompileCounter, startup_s: float
) -> Callable[[], Mapping[str, float]]:
    return lambda: {
        "recompiles_after_ready_total": counter.compiles,
        "startup_seconds": startup_s,
        "encoder_steps_total": loop.steps,
        "encoder_texts_total": loop.texts,
        "encoder_tokens_total": loop.tokens,
        "encoder_texts_waiting": loop.waiting,
    }


def _ready(files: EncoderFiles, url: str, startup_s: float) -> str:
    path, name = ("classify", "input") if files.config.labels else ("v1/embeddings", "input")
    body = f'{{"{name}": "Hello!"}}'
    return (
        f"\nReady in {startup_s:.1f} s: {files.name} at {url} (metrics {url}/metrics)\n"
        f"  curl {url}/{path} -H 'Content-Type: application/json' -d '{body}'"
    )
