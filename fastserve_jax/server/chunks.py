"""Streamed chunks encoded once and filled in many times: only the text between changes."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fastserve_jax.api import sse, wire


class ChunkTemplate:
    """`make(text)` must give the chunk for any text; it is called once."""

    __slots__ = ("_head", "_tail")

    def __init__(self, make: Callable[[str], object]) -> None:
        mark = secrets.token_hex(16)
        head, found, tail = sse.frame(wire.encode(make(mark))).partition(b'"%b"' % mark.encode())
        assert found
        assert mark.encode() not in tail
        self._head = head
        self._tail = tail

    def fill(self, text: str) -> bytes:
        return self._head + wire.encode(text) + self._tail
