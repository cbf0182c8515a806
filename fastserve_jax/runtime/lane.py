"""What one replica's plan is in arrays: the host's side of its slots and pages.

Every step's arrays are fresh: the CPU backend may alias them, and a reused buffer would change a
step in flight. Numpy alone; nothing is dispatched here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.core.types import Admission, Sampling, Work
from fastserve_jax.models.decoder import Batch

from . import sampling
from .sampling import SlotRow
from .step import Rows, StepShape

type DrawnRows = tuple[tuple[int, Sampling], ...]  # request and rules, by row
type ScoredRows = tuple[tuple[int, int, int], ...]  # request, position, alternatives, by row


@dataclass(frozen=True, slots=True)
class _Given:
    """What a slot's results must be shaped by."""

    prompt_tokens: int
    sampling: Sampling
    adapter: int


class Ends(NamedTuple):
    """Rows of a step that a token is drawn behind, or that are scored."""

    hidden: list[int]
    slots: list[int]
    positions: list[int]

    def rows(self, count: int, spare: int) -> Rows:
        """Filled up to `count` rows of slot `spare`."""
        rows = Rows(
            np.zeros(count, np.int32), np.full(count, spare, np.int32), np.zeros(count, np.int32)
        )
        for row, own in zip(rows, self, strict=True):
            row[: len(own)] = own
        return rows


class Lane:
    """Remembers the page table, and what each slot's request asked for."""

    def __init__(self, shape: StepShape, vocab_size: int) -> None:
        self.shape, self._vocab_size = shape, vocab_size
        self._page_table = np.zeros((shape.max_slots, shape.pages_per_row), np.int32)
        self._given: dict[int, _Given] = {}  # by slot

    def admit(self, admission: Admission) -> tuple[np.int32, SlotRow]:
        given = _Given(admission.prompt_tokens, admission.sampling, admission.adapter)
        self._given[admission.slot] = given
        # A target may say what its source says, and ends as that does.
        counted = admission.prompt_tokens - 1 if self.shape.encodes else 0
        row = sampling.slot_row(admission, self.shape.max_context, self._vocab_size, counted)
        return np.int32(admission.slot), row

    def admit_nobody(self) -> tuple[np.int32, SlotRow]:
        """Into a slot that is not there."""
        nobody = Admission(0, self.shape.max_slots, (), 0, Sampling(max_tokens=0))
        row = sampling.slot_row(nobody, self.shape.max_context, self._vocab_size)
        return np.int32(self.shape.max_slots), row

    def guesses(self, works: tuple[Work, ...]) -> tuple[NDArray[np.int32], ...]:
        """Slots, positions and tokens. Forward reads its tokens in the histories, and sampling
        what stands before each."""
        rows = self.shape.row_buckets[-1]
        slots, positions, tokens = np.full((3, rows), self.shape.max_slots, np.int32)
        at = 0
        for work in works:
            if not work.guesses:
                continue
            end = at + len(work.guesses)
            slots[at:end], tokens[at:end] = work.slot, work.guesses
            positions[at:end] = range(work.start + 1, work.start + work.count)
            at = end
        return slots, positions, tokens

    def batch(self, works: tuple[Work, ...]) -> Batch:
        rows = self.shape.max_slots
        slots, kv_lens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        cu_q_lens = np.zeros(rows + 1, np.int32)
        sources = np.zeros(rows, np.int32) if self.shape.encodes else None
        ones = tokens = 0
        for row, work in enumerate(works):
            end = work.first_page + len(work.pages)
            self._page_table[work.slot, work.first_page : end] = work.pages
            slots[row], kv_lens[row] = work.slot, work.start + work.count
            tokens += work.count
            cu_q_lens[row + 1] = tokens
            ones += work.count == 1
            if sources is not None:  # all of a prompt but the token that a target begins behind
                sources[row] = self._given[work.slot].prompt_tokens - 1
        cu_q_lens[len(works) + 1 :] = tokens
        distribution = np.array([ones, len(works)], np.int32)
        return Batch(slots, kv_lens, self._page_table[slots], cu_q_lens, distribution, sources)

    def adapters(self, works: tuple[Work, ...]) -> NDArray[np.int32]:
        """Of each row; 0: none."""
        of_rows = np.zeros(self.shape.max_slots, np.int32)
        of_rows[: len(works)] = [self._given[work.slot].adapter for work in works]
        return of_rows

    def drawn(self, works: tuple[Work, ...], batch: Batch) -> tuple[Ends, DrawnRows]:
        """One token behind the last known one, and one behind each guess."""
        ends, drawn = Ends([], [], []), []
        for row, work in enumerate(works):
            if not work.samples:
                continue
            rules = work.request_id, self._given[work.slot].sampling
            for back in range(len(work.guesses), -1, -1):
                ends.hidden.append(int(batch.cu_q_lens[row + 1]) - 1 - back)
                ends.slots.append(work.slot)
                ends.positions.append(work.start + work.count - back)
                drawn.append(rules)
        return ends, tuple(drawn)

    def scored(self, works: tuple[Work, ...], batch: Batch) -> tuple[Ends, ScoredRows]:
        """Every prompt token that follows one of this step's, where the request asked for it."""
        ends, scored = Ends([], [], []), []
        for row, work in enumerate(works):
            given = self._given[work.slot]
            if given.sampling.prompt_logprobs is None:
                continue
            first = int(batch.cu_q_lens[row])
            for i in range(min(work.count, given.prompt_tokens - 1 - work.start)):
                position = work.start + i + 1
                ends.hidden.append(first + i)
                ends.slots.append(work.slot)
                ends.positions.append(position)
                scored.append((work.request_id, position, given.sampling.prompt_logprobs))
        return ends, tuple(scored)
