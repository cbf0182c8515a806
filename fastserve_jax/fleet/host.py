"""One process of Ray's, and in it one host of one replica: the server itself, or one that follows.

What it runs is `fastserve serve`, in a thread; when that ends, so does the process, a moment
after it said why to whoever watches it. Knows nothing of other replicas.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from socket import create_server

from fastserve_jax.config import Settings
from fastserve_jax.errors import OperatorError
from fastserve_jax.group.membership import Membership

LAST_WORDS_S = 1.0  # for whoever watches to hear why


@dataclass(frozen=True, slots=True)
class End:
    """With the status that the process ends with."""

    status: int
    why: str


class Host:
    """An actor's class. Its methods are called from several threads at once; were one of them a
    coroutine, Ray would run all of them on one loop."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._end: End | None = None
        self._stop: Callable[[], object] | None = None
        self._is_asked_to_stop = False
        self._changed = threading.Condition()

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
        end = End(1, "it failed")
        try:
            if membership.leads:
                status = asyncio.run(_serve(self, reference, settings, cache_dir, membership))
            else:
                from fastserve_jax.follow import follow_model

                status = follow_model(reference, settings, cache_dir, membership)
            end = End(status, "it stopped")
        except OperatorError as error:
            end = End(error.exit_status, str(error))
        except BaseException as error:
            traceback.print_exc()
            end = End(1, f"{type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._end = end
                self._changed.notify_all()
            sys.stderr.flush()
            time.sleep(LAST_WORDS_S)
            os._exit(end.status)

    def running(self, stop: Callable[[], object]) -> None:
        with self._changed:
            self._stop = stop
            if self._is_asked_to_stop:
                stop()

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
        """In order: what was accepted is finished. What does not run yet stops when it does."""
        with self._changed:
            self._is_asked_to_stop = True
            if self._stop is not None:
                self._stop()

    def outlive(self) -> End:
        """Waits for the end; whoever does hears, too, when the process is gone without a word."""
        with self._changed:
            while self._end is None:
                self._changed.wait()
            return self._end


async def _serve(
    host: Host, reference: str, settings: Settings, cache_dir: Path, membership: Membership
) -> int:
    from fastserve_jax.serve import serve_models

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    host.running(lambda: loop.call_soon_threadsafe(stop.set))
    arguments = ([reference], settings, cache_dir, time.perf_counter(), membership)
    return await serve_models(*arguments, stop=stop, on_ready=host.ready)


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
