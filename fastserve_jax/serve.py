"""`fastserve serve`: listens at once, loads beside it, and is ready when every program is compiled.

While loading, /health answers and /ready and all work get 503. Joins server, engine and device.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.config import Settings
from fastserve_jax.engine import Engine
from fastserve_jax.follow import all_or_none, end_with_group
from fastserve_jax.group.leader import Leader
from fastserve_jax.group.membership import Membership
from fastserve_jax.metrics import Metrics
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.hosts import part
from fastserve_jax.server.lifecycle import serve
from fastserve_jax.server.state import Served, ServerState
from fastserve_jax.terminal import Bars, console, ready_lines

_BLAME_S = 1.0  # a step may fail for want of a host before it is known which one is gone


async def serve_model(
    reference: str,
    settings: Settings,
    cache_dir: Path,
    began: float,
    membership: Membership | None = None,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve until a signal or `stop`. Returns the exit status; raises OperatorErrors. With a
    `membership` of several hosts, as the one that leads.

    `began` is when the person began to wait, by time.perf_counter.
    """
    stop = stop or asyncio.Event()
    metrics = Metrics(reference)
    state = ServerState(settings.server, metrics)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(state, url.set_result, stop), name="server")
    running: list[Engine] = []
    leader = _leader(membership, running, stop)
    try:
        opening: set[asyncio.Future[bool] | asyncio.Future[str]] = {server, url}
        await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()  # raises what kept it from listening, before anything is loaded
        with Bars() as bars:
            loading = _in_thread(lambda: _loaded(reference, settings, cache_dir, bars, leader))
            both: set[asyncio.Future[bool] | asyncio.Future[Loaded]] = {server, loading}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            console.print("stopped while loading")
            os._exit(0)  # a compilation cannot be interrupted, and nothing is owed to anybody
        with loading.result().runner, CompileCounter() as counter:
            loaded = loading.result()
            metrics.model_name = loaded.name
            metrics.observe(_device_numbers(loaded, counter, time.perf_counter() - began))
            async with loaded.engine(metrics.step) as engine:
                running.append(engine)
                metrics.watch_engine(engine.stats, loaded.limits.page_size)
                gc.freeze()  # what was loaded stays: no collection need look at it
                gc.enable()
                state.ready(_served(loaded, engine))
                address = await url
                on_ready(address)
                if leader is not None:
                    watching = asyncio.create_task(_watch(engine, leader), name="watch")
                    server.add_done_callback(lambda _: watching.cancel())
                console.print(
                    ready_lines(
                        loaded.name,
                        address,
                        time.perf_counter() - began,
                        chat=loaded.tokenizer.chat_template is not None,
                        key=bool(settings.server.api_keys),
                    ),
                    soft_wrap=True,
                )
                finished = await server
        if leader is not None:
            leader.close()
            part()
        return 0 if finished else 1
    finally:
        stop.set()
        await asyncio.wait({server})


def _loaded(
    reference: str, settings: Settings, cache_dir: Path, bars: Bars, leader: Leader | None
) -> Loaded:
    with all_or_none() if leader is not None else nullcontext():
        return load(reference, settings, cache_dir, bars, leader)


async def _watch(engine: Engine, leader: Leader) -> None:
    """Where the engine stops by itself, the other hosts would wait for it."""
    await engine.ended()
    if engine.failure is not None:
        await asyncio.sleep(_BLAME_S)
        leader.fail(f"a step failed on host 0: {engine.failure}")


def _leader(
    membership: Membership | None, running: list[Engine], stop: asyncio.Event
) -> Leader | None:
    """Whatever it hears from the other hosts, it hears on a thread of theirs."""
    if membership is None or membership.num_hosts == 1:
        return None
    loop = asyncio.get_running_loop()

    def tell_clients(why: str) -> None:
        for engine in running:
            engine.abandon(f"the server has lost a host and must start again: {why}")

    def lost(why: str) -> None:
        end_with_group(why, lambda: loop.call_soon_threadsafe(tell_clients, why))

    def leaving(why: str) -> None:
        console.print(f"{why}: the group stops", highlight=False)
        loop.call_soon_threadsafe(stop.set)

    return Leader(membership, lost, leaving, lambda what: console.print(what, highlight=False))


def _served(loaded: Loaded, engine: Engine) -> Served:
    has_template = loaded.tokenizer.chat_template is not None
    return Served(
        name=loaded.name,
        engine=engine,
        tokenizer=loaded.tokenizer,
        context=min(loaded.limits.max_context, loaded.limits.page_size * loaded.limits.num_pages),
        # The plain one is for models that continue a text.
        template=None if loaded.opening and not has_template else loaded.template,
        defaults=loaded.defaults,
        opening=loaded.opening,
    )


def _device_numbers(
    loaded: Loaded, counter: CompileCounter, startup_s: float
) -> Callable[[], Mapping[str, float]]:
    return lambda: {
        "recompiles_after_ready_total": counter.compiles,
        "compiled_programs": loaded.programs,
        "compile_seconds": loaded.compile_s,
        "startup_seconds": startup_s,
    }


def _in_thread[T](work: Callable[[], T]) -> asyncio.Future[T]:
    """Like asyncio.to_thread, but a process that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
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
