"""A number over all tokens drawn so far, by which hosts notice that they do not draw the same."""

from __future__ import annotations

import struct
import zlib

from fastserve_jax.core.types import StepResult

EVERY = 16  # steps from one comparison to the next


class Tally:
    def __init__(self) -> None:
        self._steps = self._crc = 0

    def add(self, result: StepResult) -> tuple[int, int] | None:
        """Of the next step. Every so often, how many there were and the number over all of them."""
        tokens = [sampled.token for sampled in result.sampled.values()]
        tokens += [sampled.token for behind in result.behind.values() for sampled in behind]
        known = [-1 if token is None else token for token in tokens]
        self._crc = zlib.crc32(struct.pack(f"<{len(known)}i", *known), self._crc)
        self._steps += 1
        return (self._steps, self._crc) if self._steps % EVERY == 0 else None
