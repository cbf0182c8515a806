"""One process of Ray's, and in it one host of one replica: the server itself, or one that follows.

What it runs is `fastserve serve`, in a thread; when that ends, so does the process, which is how
whoever watches it learns of it. Knows nothing of other replicas.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from socket import create_server

from fastserve_jax.config import Settings
from fastserve_jax.errors import FastServeError
from fastserve_jax.group.membership import Membership


class Host:
    """An actor's class. Its methods are called from several threads at once; were one of them a
    coroutine, Ray would run all of them on one loop."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._changed = threading.Condition()
        self._stop: Callable[[], object] = lambda: None

    def coordinator(self) -> str:
        """An address for hosts of a group to meet at, if this one leads: two free ports."""
        with ExitStack() as held:
            while True:
                first = held.enter_context(closing(create_server(("", 0)))).getsockname()[1]
                try:
                    held.enter_context(closing(create_server(("", first + 1))))
                except OSError:
                    continue
                return f"{_own_address()}:{first}"

    def start(
        self, reference: str, settings: Settings, cache_dir: str, membership: Membership
    ) -> None:
        arguments = (reference, settings, Path(cache_dir), membership)
        threading.Thread(target=self._run, args=arguments, name="serve", daemon=True).start()

    def _run(
        self, reference: str, settings: Settings, cache_dir: Path, membership: Membership
    ) -> None:
        status = 1
        try:
            if membership.leads:
                status = asyncio.run(_serve(self, reference, settings, cache_dir, membership))
            else:
                from fastserve_jax.follow import follow_model

                status = follow_model(reference, settings, cache_dir, membership)
        except FastServeError as error:
            print(f"fastserve: {error}", flush=True)
            status = 2
        finally:
            os._exit(status)

    def running(self, stop: Callable[[], object]) -> None:
        self._stop = stop

    def ready(self, url: str) -> None:
        with self._changed:
            self._url = url
            self._changed.notify_all()

    def address(self) -> str:
        """Waits until the server is ready; its URL, from wherever a client may be."""
        with self._changed:
            while self._url is None:
                self._changed.wait()
            port = self._url.rpartition(":")[2]
        return f"http://{_own_address()}:{port}"

    def stop(self) -> None:
        """In order: what was accepted is finished."""
        self._stop()

    def process(self) -> int:
        return os.getpid()

    def outlive(self) -> None:
        """Never returns: whoever waits for it hears when the process is gone."""
        threading.Event().wait()


async def _serve(
    host: Host, reference: str, settings: Settings, cache_dir: Path, membership: Membership
) -> int:
    from fastserve_jax.serve import serve_model

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    host.running(lambda: loop.call_soon_threadsafe(stop.set))
    arguments = (reference, settings, cache_dir, time.perf_counter(), membership)
    return await serve_model(*arguments, stop=stop, on_ready=host.ready)


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
