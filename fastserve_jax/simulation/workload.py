"""Requests to simulate: when they come, how long they are, and what they share.

Knows core's words; nothing of files, distributions, policies or devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..core.simulate import STOP
from ..core.types import Request, Sampling
from ..errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BLOCK_TOKENS = 512  # of a prompt, that one of the trace's hashes stands for
MOST_TOKENS = 1 << 20  # of one prompt or output: more is a mistake in the file
_FIRST_ID = 1 << 20  # of prompts' tokens, far from those that the simulated device draws


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of one run, by arrival; a request's id is its place."""

    name: str
    arrival_s: FloatArray  # from the first one on
    prompt_tokens: IntArray
    output_tokens: IntArray
    timed: bool = True  # False: the arrivals have a shape and no unit; only `scaled_to` gives one
    cap: int = 0  # output tokens that every client asks for at most; 0: the largest output
    blocks: tuple[tuple[int, ...], ...] | None = None  # hashes of each prompt's stretches
    clients: tuple[str, ...] | None = None
    dropped: int = 0  # rows of the source that ask for no output

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def total_output_tokens(self) -> int:
        return int(self.output_tokens.sum())

    @property
    def arrivals_per_s(self) -> float:
        """As counted: what a generator promises is missed by tenths where arrivals are bursty, and
        a load would mean something else with every seed. Raises ConfigError for a single moment."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        if span_s <= 0:
            raise ConfigError(
                f"{self.name}: all requests arrive at one moment, which no load can stretch: "
                "take more of them, or leave --rho out"
            )
        return (len(self) - 1) / span_s

    # Other workloads made of this one

    def window(self, start: int, count: int) -> Workload:
        """`count` requests from the one at `start` on; time begins with the first of them."""
        return self._only(np.arange(start, min(start + count, len(self))))

    def first(self, count: int) -> Workload:
        return self.window(0, count)

    def kept(self, keep: npt.NDArray[np.bool_]) -> Workload:
        """Those marked in `keep`, when they came."""
        return self if keep.all() else self._only(np.flatnonzero(keep))

    def scaled_to(self, rate: float) -> Workload:
        """The same arrivals, stretched or pressed to `rate` a second."""
        factor = self.arrivals_per_s / rate
        return replace(self, arrival_s=self.arrival_s * factor, timed=True)

    def at_once(self) -> Workload:
        return replace(self, arrival_s=np.zeros(len(self)), timed=True)

    def _only(self, chosen: IntArray) -> Workload:
        arrival_s = self.arrival_s[chosen]
        return replace(
            self,
            arrival_s=arrival_s - arrival_s[:1],
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            blocks=None if self.blocks is None else tuple(self.blocks[i] for i in chosen),
            clients=None if self.clients is None else tuple(self.clients[i] for i in chosen),
        )

    # For the scheduler

    @property
    def longest_output(self) -> int:
        """What a client asks for, who does not know how long the answer will be."""
        return max(self.cap, int(self.output_tokens.max()))

    def most_tokens(self, context: int) -> int:
        """Of prompt and max_tokens of any request, where none may have more than `context`."""
        return min(context, int(self.prompt_tokens.max()) + self.longest_output)

    def lengths(self) -> dict[int, int]:
        """Request id to the output tokens after which it stops."""
        return dict(enumerate(self.output_tokens.tolist()))

    def arrivals(self, context: int) -> Iterator[tuple[float, Request]]:
        """When and what, made as it is asked for, since prompts are long.

        All ask for the same max_tokens, or for what `context` leaves beside their prompt: neither
        tells how much they will produce. Every prompt must leave room for its output.
        """
        cap, stop_ids = self.longest_output, frozenset({STOP})
        known: dict[int, int] = {}  # a hash to the token that fills its block
        prompts = self.prompt_tokens.tolist()
        for i, (now, count) in enumerate(zip(self.arrival_s.tolist(), prompts, strict=True)):
            sampling = Sampling(min(cap, context - count), stop_ids=stop_ids)
            client = "" if self.clients is None else self.clients[i]
            yield now, Request(i, self._prompt(i, count, known), sampling, client=client)

    def _prompt(self, i: int, count: int, known: dict[int, int]) -> tuple[int, ...]:
        """Its own token throughout, but for blocks that the trace has a hash of."""
        own = _FIRST_ID + i
        if self.blocks is None:
            return (own,) * count
        tokens: list[int] = []
        for block in self.blocks[i][: math.ceil(count / BLOCK_TOKENS)]:
            token = known.setdefault(block, _FIRST_ID + len(self) + len(known))
            tokens += [token] * min(BLOCK_TOKENS, count - len(tokens))
        return (*tokens, *(own,) * (count - len(tokens)))
