"""Drops connections whose peer has stopped reading. One timer for all of them, none per write.

Knows transports; knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Gate:
    """One connection's writes. `since` is when the oldest that still waits began, or None."""

    __slots__ = ("_clock", "_writers", "since", "transport")

    def __init__(self, transport: asyncio.Transport, clock: Callable[[], float]) -> None:
        self.transport = transport
        self.since: float | None = None
        self._clock = clock
        self._writers = 0

    def __enter__(self) -> None:
        """One write; several may be under way at once."""
        self._writers += 1
        if self.since is None:
            self.since = self._clock()

    def __exit__(self, *_: object) -> None:
        self._writers -= 1
        self.since = self._clock() if self._writers else None


class SlowReaders:
    """Aborts a connection when one of its writes has waited `limit_s`.

    The abort reaches the handler as a lost connection, so its generation is given up too.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._gates: set[Gate] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.dropped = 0

    def enter(self, transport: asyncio.Transport) -> Gate:
        gate = Gate(transport, asyncio.get_running_loop().time)
        self._gates.add(gate)
        if self._timer is None:
            self._rearm()
        return gate

    def leave(self, gate: Gate) -> None:
        self._gates.discard(gate)

    def _rearm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._limit_s / 4, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        overdue = loop.time() - self._limit_s
        for gate in self._gates:
            if gate.since is not None and gate.since < overdue:
                self.dropped += 1
                gate.transport.abort()
        if self._gates:
            self._rearm()
