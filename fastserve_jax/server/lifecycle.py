"""From the first listening socket to the last: start, signals, drain, stop.

SIGTERM or SIGINT: /ready turns 503 and new work is refused while the socket still listens;
accepted work finishes, within a limit; then everything closes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from aiohttp import web

from fastserve_jax.errors import ConfigError
from fastserve_jax.server.app import create_app
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.state import ServerState

LAST_BYTES_S = 1.0  # for answers already made to reach their readers

_log = logging.getLogger(__name__)


def listening(state: ServerState) -> AbstractAsyncContextManager[str]:
    return app_listening(create_app(state), state.config)


@asynccontextmanager
async def app_listening(app: web.Application, config: ServerConfig) -> AsyncIterator[str]:
    """Serve `app` while inside; gives the URL. Leaving closes every connection.

    Raises ConfigError when the address cannot be had.
    """
    runner = web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=config.keepalive_timeout_s,
        shutdown_timeout=LAST_BYTES_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; "
                "choose another --port or --host"
            ) from error
        host, port = runner.addresses[0][:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        await runner.cleanup()


async def drain(state: ServerState) -> bool:
    """Take no new work and wait for what was accepted. False when the limit was reached first."""
    state.drain()
    try:
        async with asyncio.timeout(state.config.drain_timeout_s):
            await state.idle()
    except TimeoutError:
        _log.warning("%d requests were cut off by the drain limit", state.in_flight)
        return False
    return True


async def serve(
    state: ServerState,
    on_listening: Callable[[str], None] = lambda url: None,
    stop: asyncio.Event | None = None,
) -> bool:
    """Listen until a signal or `stop`, then drain. True when all accepted work was finished."""
    stop = stop or asyncio.Event()
    async with listening(state) as url:
        with _signals(stop):
            on_listening(url)
            await stop.wait()
            return await drain(state)


@contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; a second one then acts as it does by default. They are the
    main thread's: elsewhere somebody else has them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    kinds = (signal.SIGTERM, signal.SIGINT)

    def received() -> None:
        stop.set()
        for kind in kinds:
            loop.remove_signal_handler(kind)

    for kind in kinds:
        loop.add_signal_handler(kind, received)
    try:
        yield
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)
