"""`fastserve serve`: listens at once, loads beside it, and is ready when every program is compiled.

While loading, /health answers and /ready and all work get 503. Joins server, models and device.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastserve_jax.config import Settings
from fastserve_jax.engine import Engine
from fastserve_jax.errors import ConfigError
from fastserve_jax.follow import end_with_group
from fastserve_jax.group.leader import Leader
from fastserve_jax.group.membership import Membership
from fastserve_jax.hosting import Hosting, in_thread
from fastserve_jax.metrics import Metrics
from fastserve_jax.roster import Roster
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.hosts import part
from fastserve_jax.server.lifecycle import serve
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState
from fastserve_jax.terminal import console, ready_lines
from fastserve_jax.weights.adapter import find_adapter, read_facts
from fastserve_jax.weights.load import named

_BLAME_S = 1.0  # a step may fail for want of a host before it is known which one is gone


async def serve_models(
    references: Sequence[str],
    settings: Settings,
    cache_dir: Path,
    began: float,
    membership: Membership | None = None,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> int:
    """Serve until a signal or `stop`; a request that names no model means the first. `references`
    may be NAME=REFERENCE. Returns the exit status; raises OperatorErrors. With a `membership` of
    several hosts, as the one that leads.

    A thread "load" may be left: a compilation cannot be interrupted, but the process may end.

    `began` is when the person began to wait, by time.perf_counter.
    """
    stop = stop or asyncio.Event()
    models = [named(reference) for reference in references]
    metrics = Metrics(models[0][0])
    state = ServerState(settings.server, metrics)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(state, url.set_result, stop), name="server")
    leader = _leader(membership, state, stop)
    counter = CompileCounter()
    roster = Roster(state, Hosting(settings, cache_dir, metrics, counter, models[0][0], leader))
    try:
        opening: set[asyncio.Future[bool] | asyncio.Future[str]] = {server, url}
        await asyncio.wait(opening, return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()  # raises what kept it from listening, before anything is loaded
        with counter:
            checked = in_thread(lambda: _check(models, settings, cache_dir, leader))
            loading = asyncio.create_task(_load(roster, models, checked), name="loading")
            both: set[asyncio.Task[bool] | asyncio.Task[None]] = {server, loading}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                console.print("stopped while loading")
                loading.cancel()
                return 0  # nothing is owed to anybody
            loading.result()
            metrics.observe(lambda: {"recompiles_after_ready_total": counter.compiles})
            gc.freeze()  # what was loaded stays: no collection need look at it
            gc.enable()
            state.ready()
            address = await url
            on_ready(address)
            watching = _watch(state, roster, cache_dir, leader)
            console.print(_ready(state, address, time.perf_counter() - began), soft_wrap=True)
            finished = await server
            watching.cancel()
            await roster.close()
        if leader is not None:
            leader.close()
            part()
        return 0 if finished else 1
    finally:
        stop.set()
        await asyncio.wait({server})
        await roster.close()


async def _load(
    roster: Roster, models: Sequence[tuple[str, str]], checked: asyncio.Future[None]
) -> None:
    """Nothing here may hold one of them: it would stay when another has taken its place."""
    await checked
    for name, reference in models:
        await roster.load(reference, name)


def _check(
    models: Sequence[tuple[str, str]], settings: Settings, cache_dir: Path, leader: Leader | None
) -> None:
    """What can be known before the slow part. Raises OperatorErrors."""
    if leader is not None and len(models) > 1:
        raise ConfigError("a group of hosts serves one model")
    names = [name for name, _ in models]
    if "" in names or len({*names}) < len(names):
        raise ConfigError(f"models {', '.join(names)}: write NAME=REFERENCE, each name once")
    for adapter in settings.lora.named().values():
        read_facts(find_adapter(adapter, cache_dir))


def _watch(
    state: ServerState, roster: Roster, cache_dir: Path, leader: Leader | None
) -> asyncio.Task[None]:
    """Over what may change while it is served. A group serves what it began with."""
    if leader is None:
        state.roster = roster
        return asyncio.create_task(roster.follow(cache_dir), name="follow")
    (own,) = state.entries
    assert isinstance(own, Served)
    assert isinstance(own.engine, Engine)
    return asyncio.create_task(_tell_group(own.engine, leader), name="watch")


async def _tell_group(engine: Engine, leader: Leader) -> None:
    """Where the engine stops by itself, the other hosts would wait for it."""
    await engine.ended()
    if engine.failure is not None:
        await asyncio.sleep(_BLAME_S)
        leader.fail(f"a step failed on host 0: {engine.failure}")


def _leader(
    membership: Membership | None, state: ServerState, stop: asyncio.Event
) -> Leader | None:
    """Whatever it hears from the other hosts, it hears on a thread of theirs."""
    if membership is None or membership.num_hosts == 1:
        return None
    loop = asyncio.get_running_loop()

    def tell_clients(why: str) -> None:
        for served in state.entries:
            assert isinstance(served.engine, Engine)
            served.engine.abandon(f"the server has lost a host and must start again: {why}")

    def lost(why: str) -> None:
        end_with_group(why, lambda: loop.call_soon_threadsafe(tell_clients, why))

    def leaving(why: str) -> None:
        console.print(f"{why}: the group stops", highlight=False)
        loop.call_soon_threadsafe(stop.set)

    return Leader(membership, lost, leaving, lambda what: console.print(what, highlight=False))


def _ready(state: ServerState, url: str, waited_s: float) -> str:
    """With what to ask the first one."""
    first = state.entries[0]
    if isinstance(first, Served):
        is_chat = first.tokenizer.chat_template is not None
        route = "v1/chat/completions" if is_chat else "v1/completions"
    else:
        route = "classify" if first.labels else "v1/embeddings"
    names = [served.name for served in state.entries]
    return ready_lines(names, url, waited_s, route, bool(state.config.api_keys))
