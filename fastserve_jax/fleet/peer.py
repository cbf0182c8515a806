"""One replica, as those see it who exchange something with it: an address that may be lost.

A node that vanishes says nothing: whoever waits for an answer is told here, when others notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web


class NotAnsweredError(Exception):
    """By this replica; another may. `answer` is what it said instead, if anything."""

    def __init__(self, why: str, answer: web.StreamResponse | None = None) -> None:
        super().__init__(why)
        self.answer = answer


class Peer:
    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.in_flight = 0  # requests
        self._is_lost = False
        self._waits: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def awaited(self) -> AsyncIterator[None]:
        """Around what waits for it, and nothing else. Raises NotAnsweredError where it is gone."""
        if self._is_lost:
            raise NotAnsweredError("it is gone")
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except (aiohttp.ClientError, OSError) as error:
            raise NotAnsweredError(str(error) or "it is gone") from error

    def lose(self) -> None:
        """Ends everything that waits for it."""
        self._is_lost = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())
