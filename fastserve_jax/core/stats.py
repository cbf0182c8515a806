"""The scheduler's numbers at one moment, for whoever watches. Counts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at one moment; everything after `pages_total` only ever grows."""

    running: int
    waiting: int
    ending: int  # preempted or over, with a step still in flight
    pages_used: int  # referenced
    pages_cached: int  # unreferenced, kept for their prefix
    pages_total: int
    submitted: int = 0
    rejected: int = 0
    finished: int = 0  # for whatever reason
    preemptions: int = 0
    prefix_query_tokens: int = 0  # of admitted sequences
    prefix_hit_tokens: int = 0  # of them, found in the cache
    computed_tokens: int = 0  # positions run, recomputed ones included
    output_tokens: int = 0
    guessed_tokens: int = 0  # run before they were known
    accepted_tokens: int = 0  # of them, drawn as guessed
    proposed_tokens: int = 0  # by a draft model
    asked_s: float = 0.0  # in which it did
    steps: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0  # of it, by which copies made steps longer, as the cost model has it
    pages_out: int = 0  # copied to host memory
    pages_in: int = 0
    page_bytes: int = 0
    host_pages_used: int = 0
    host_pages_total: int = 0
    host_hit_tokens: int = 0  # of prefix_hit_tokens, from host memory
    recomputed_tokens: int = 0  # computed again because a preemption lost them
    cost_error: float = 0.0  # of the cost model: mean of |measured / predicted - 1|, moving
    levels: tuple[int, ...] = ()  # live sequences at each of the policy's levels
    policy: Mapping[str, float] = field(default_factory=dict)  # what it says of itself


_ALIKE = ("cost_error", "page_bytes")  # in all of them, about; everything else adds up


def together(every: Sequence[Stats]) -> Stats:
    """Of several schedulers of one kind."""
    made = {f.name: [getattr(stats, f.name) for stats in every] for f in fields(Stats)}
    levels = tuple(map(sum, zip(*made.pop("levels"), strict=True)))
    numbers = made.pop("policy")
    policy = {name: sum(n[name] for n in numbers) / len(numbers) for name in numbers[0]}
    whole = {name: of[0] if name in _ALIKE else sum(of) for name, of in made.items()}
    return Stats(**whole, levels=levels, policy=policy)
