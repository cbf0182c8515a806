"""A server's process, for as long as it is measured: how long until ready, how much memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

STOP_S = 20.0  # to end by itself once told to
POLL_S = 0.05


class HostingError(Exception):
    """Why a server cannot be had, in one line."""


@dataclass
class Host:
    """One side's command, and what was seen of all its processes."""

    name: str
    url: str
    command: str
    ready_within_s: float = 600.0
    starts_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Watch]:
        """Started and ready within; stopped, with its children, at the end."""
        if await answers(self.url, "/health") is not None:
            raise HostingError(f"{self.name}: something else answers at {self.url} already")
        with tempfile.TemporaryFile() as log:
            began = time.perf_counter()
            try:
                process = await asyncio.create_subprocess_exec(
                    *shlex.split(self.command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                raise HostingError(f"{self.name}: cannot start {self.command!r}: {error}") from None
            watch = Watch(self, process.pid)
            try:
                while not await is_ready(self.url):
                    if process.returncode is not None:
                        raise HostingError(
                            f"{self.name}: ended with status {process.returncode} before it was "
                            f"ready: {_last_line(log.fileno())}"
                        )
                    if time.perf_counter() - began > self.ready_within_s:
                        raise HostingError(
                            f"{self.name}: not ready after {self.ready_within_s:.0f} s"
                        )
                    await asyncio.sleep(POLL_S)
                self.starts_s.append(time.perf_counter() - began)
                watch.look()
                yield watch
                watch.look()
            finally:
                await _stop(process)


@dataclass(frozen=True)
class Watch:
    host: Host
    pid: int

    def look(self) -> None:
        """Between measurements: each living process at its own highest, added up."""
        peak = sum(map(_high_water, _tree(self.pid)))
        self.host.peak_bytes = max(self.host.peak_bytes, peak)


async def answers(url: str, path: str) -> int | None:
    """The status; None where nobody does."""
    timeout = aiohttp.ClientTimeout(total=5)
    base = url.rstrip("/").removesuffix("/v1")
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(base + path) as r:
            return r.status
    except (aiohttp.ClientError, TimeoutError):
        return None


async def is_ready(url: str) -> bool:
    """/ready says so where there is one; else /health, 503 while llama.cpp loads."""
    return await answers(url, "/health") == 200 and await answers(url, "/ready") in (200, 404)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    with contextlib.suppress(ProcessLookupError):  # it leads a group of its own
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _tree(root: int) -> list[int]:
    """Linux only; elsewhere nothing is seen."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _last_line(log: int) -> str:
    size = os.fstat(log).st_size
    lines = os.pread(log, 4096, max(0, size - 4096)).decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
