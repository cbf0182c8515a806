"""Responses kept for `previous_response_id` and GET: bounded in count, bytes and age.

Knows nothing of who asks beyond an owner string that must match.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastserve_jax.api.chat import ChatTurn


@dataclass(frozen=True, slots=True)
class Stored:
    body: bytes  # the Response as JSON
    turns: tuple[ChatTurn, ...]  # the conversation up to and with its output
    owner: str
    expires: float  # on the store's clock
    size: int


class ResponseStore:
    """Oldest out first."""

    def __init__(
        self,
        max_count: int,
        max_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response_id: str, body: bytes, turns: list[ChatTurn], owner: str) -> None:
        """Keeps it, unless it alone is larger than the store."""
        self.drop(response_id)
        size = len(body) + sum(len(str(t["content"])) + 64 for t in turns)
        expires = self._clock() + self._ttl_s
        self._entries[response_id] = Stored(body, tuple(turns), owner, expires, size)
        self._bytes += size
        while self._entries and (
            len(self._entries) > self._max_count
            or self._bytes > self._max_bytes
            or next(iter(self._entries.values())).expires <= self._clock()
        ):
            self.drop(next(iter(self._entries)))

    def get(self, response_id: str, owner: str) -> Stored | None:
        entry = self._entries.get(response_id)
        if entry is None or entry.owner != owner:
            return None
        if entry.expires <= self._clock():
            self.drop(response_id)
            return None
        return entry

    def drop(self, response_id: str) -> None:
        entry = self._entries.pop(response_id, None)
        if entry is not None:
            self._bytes -= entry.size
