"""One model that is served: loaded in a thread beside everything else, its engine or loop running,
and all of it given back at the end. Knows no other model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.config import Settings
from fastserve_jax.encoding import Encodings
from fastserve_jax.engine import Engine
from fastserve_jax.errors import ConfigError
from fastserve_jax.follow import all_or_none
from fastserve_jax.group.leader import Leader
from fastserve_jax.hosting_encoder import LoadedEncoder, load_encoder
from fastserve_jax.metrics import Metrics
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.server.served import Entry, Served, ServedEncoder
from fastserve_jax.terminal import Bars
from fastserve_jax.weights.load import find_encoder, named


@dataclass(slots=True)
class Hosting:
    """What every model is loaded with. A draft model and the adapters in `settings` are those of
    the one called `first`, and of what takes its place."""

    settings: Settings
    cache_dir: Path
    metrics: Metrics
    counter: CompileCounter
    first: str
    leader: Leader | None = None
    _adapters: dict[str, dict[str, str]] = field(default_factory=dict)  # by model: wanted beside it

    @asynccontextmanager
    async def host(self, reference: str, name: str | None = None) -> AsyncIterator[Entry]:
        """Of any kind, for clients to call `name`; None takes its own. Entering takes as long as
        loading does. Raises OperatorErrors."""
        began = time.perf_counter()
        name = name or named(reference)[0]
        settings = self._settings(name)
        with self.counter.paused(), Bars() as bars:
            loaded = await in_thread(lambda: self._load(reference, settings, bars))
        opened: AbstractAsyncContextManager[Entry]
        if isinstance(loaded, Loaded):
            opened = self._decoder(loaded, name, began)
        else:
            opened = self._encoder(loaded, name, began)
        async with opened as served:
            yield served

    def forget(self, name: str) -> None:
        """Whatever is called so next begins without adapters."""
        self._adapters.pop(name, None)
        if name == self.first:
            self.first = ""

    def _settings(self, name: str) -> Settings:
        own = self.settings
        if name == self.first:
            return own
        model, lora = replace(own.model, draft=""), replace(own.lora, adapters=())
        return replace(own, model=model, lora=lora)

    def _load(self, reference: str, settings: Settings, bars: Bars) -> Loaded | LoadedEncoder:
        files = find_encoder(reference, self.cache_dir, bars.pull)
        if files is not None:
            if self.leader is not None:
                raise ConfigError(f"{files.name} is an encoder: it is served by one host")
            return load_encoder(files, settings, self.cache_dir)
        with all_or_none() if self.leader is not None else nullcontext():
            return load(reference, settings, self.cache_dir, bars, self.leader)

    @asynccontextmanager
    async def _decoder(self, loaded: Loaded, name: str, began: float) -> AsyncIterator[Served]:
        metrics = self.metrics.of(name)
        with loaded.runner:
            async with loaded.engine(metrics.step) as engine:
                wanted = self._adapters.setdefault(name, loaded.settings.lora.named())
                adapters = loaded.adapters(engine, self.cache_dir, wanted)
                if adapters is not None:
                    await adapters.load_wanted()
                numbers = {
                    "compiled_programs": loaded.programs,
                    "compile_seconds": loaded.compile_s,
                    "startup_seconds": time.perf_counter() - began,
                }
                metrics.observe(lambda: numbers)
                with metrics.watching(engine.stats, loaded.limits.page_size):
                    yield replace(_served(loaded, engine, name), adapters=adapters)

    @asynccontextmanager
    async def _encoder(
        self, loaded: LoadedEncoder, name: str, began: float
    ) -> AsyncIterator[ServedEncoder]:
        startup_s = time.perf_counter() - began
        async with loaded.encodings as loop:
            self.metrics.of(name).observe(lambda: _numbers(loop, startup_s))
            config = loaded.config
            shape = (config.max_context, config.hidden_size, config.labels)
            yield ServedEncoder(name, loop, loaded.words, *shape, root=loaded.name)


def _served(loaded: Loaded, engine: Engine, name: str) -> Served:
    has_template = loaded.tokenizer.chat_template is not None
    return Served(
        name=name,
        engine=engine,
        tokenizer=loaded.tokenizer,
        context=min(loaded.limits.max_context, loaded.limits.page_size * loaded.limits.num_pages),
        # The plain one is for models that continue a text.
        template=None if loaded.opening and not has_template else loaded.template,
        defaults=loaded.defaults,
        root=loaded.name,
        opening=loaded.opening,
    )


def _numbers(loop: Encodings, startup_s: float) -> dict[str, float]:
    return {
        "startup_seconds": startup_s,
        "encoder_steps_total": loop.steps,
        "encoder_texts_total": loop.texts,
        "encoder_tokens_total": loop.tokens,
        "encoder_texts_waiting": loop.waiting,
    }


def in_thread[T](work: Callable[[], T]) -> asyncio.Future[T]:
    """Like asyncio.to_thread, but a process that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome, error = work(), None
        except BaseException as caught:
            outcome, error = None, caught
        try:
            loop.call_soon_threadsafe(settle, outcome, error)
        except RuntimeError:
            return  # the loop is closed: nobody waits

    threading.Thread(target=run, name="load", daemon=True).start()
    return future
