"""A draft model on the device: a second decoder that runs ahead in the slots' histories.

    draft[tokens]    new tokens through it; behind each row that ends, its best token is put into
                     the history, where the next run reads it

What it puts there stands behind all that is known, as guesses do, so it may be wrong. It has rows
of its own, fewer than there are slots, each with a fixed run of pages for a whole context: nothing
of it is ever moved. A slot keeps its row until another, longer unused, takes it. Knows slots and
positions; whether it is worth asking is not its to know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fastserve_jax.core.types import Ask, AskRow
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import Batch, Decoder, State, head_of, place
from fastserve_jax.models.layers import best_output, project
from pallas_kernels import KVLayout, target

from . import pick
from .shapes import Program, by_leaves, ints, like
from .step import Rows, buckets


@dataclass(frozen=True, slots=True)
class DraftShape:
    """The bounds that its programs are compiled for."""

    rows: int  # sequences at once
    context: int  # tokens of each
    page_size: int
    max_slots: int  # this and what follows is that of the model it drafts for
    max_context: int
    step_tokens: int

    @property
    def pages_per_row(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def token_buckets(self) -> tuple[int, ...]:
        return buckets(max(self.step_tokens, self.rows))

    def ends(self, tokens: int) -> int:
        """Rows that may end in a run of so many tokens."""
        return min(tokens, self.rows)

    def layout(self, config: ModelConfig) -> KVLayout:
        pages = self.rows * self.pages_per_row
        return KVLayout(pages, config.num_kv_heads, self.page_size, config.head_dim, target().lanes)

    def kv_bytes(self, config: ModelConfig, dtype: DTypeLike) -> int:
        layout = self.layout(config)
        return layout.page_bytes(dtype) * layout.num_pages * config.num_layers


def empty_draft_pages(config: ModelConfig, shape: DraftShape, dtype: DTypeLike) -> list[jax.Array]:
    """One array per layer, as KVLayout says."""
    return [jnp.zeros(shape.layout(config).shape, dtype) for _ in range(config.num_layers)]


def draft_programs(
    graph: nnx.GraphDef[Decoder],
    config: ModelConfig,
    shape: DraftShape,
    params: State,
    dtype: DTypeLike,
) -> Iterator[Program]:
    """Every one. Of `params` only shapes are read."""

    def draft(
        state: State,
        kv_pages: list[jax.Array],
        history: jax.Array,
        batch: Batch,
        ends: Rows,
        tokens: int,
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """-> pages and history (donated through), the tokens behind `ends`."""
        at = place(batch, tokens, shape.layout(config))
        given = history[jnp.asarray(batch.slots)[at.rows], at.positions]
        hidden, kv_pages = nnx.merge(graph, state)(given, kv_pages, batch, at)
        slots, head = jnp.asarray(ends.slots), head_of(config, state)
        chosen = hidden[ends.hidden]
        live = jnp.sum(slots < shape.max_slots, dtype=jnp.int32)  # they stand first
        best = best_output(chosen, head, live) or pick.highest(project(chosen, head, live))
        history = history.at[slots, ends.positions].set(best[1], mode="drop")
        return kv_pages, history, best[1]

    leaves, function = by_leaves(draft, params)
    kv_pages = [like(shape.layout(config).shape, dtype) for _ in range(config.num_layers)]
    history = ints(shape.max_slots, shape.max_context)
    table = ints(shape.rows, shape.pages_per_row)
    batch = Batch(ints(shape.rows), ints(shape.rows), table, ints(shape.rows + 1), ints(2))
    for tokens in reversed(shape.token_buckets):
        ends = Rows(*[ints(shape.ends(tokens))] * 3)
        given = (leaves, kv_pages, history, batch, ends)
        yield Program(f"draft[{tokens}]", partial(function, tokens=tokens), given, donated=(1, 2))


@dataclass(frozen=True, slots=True)
class Drafting:
    """What has been dispatched for an ask: the tokens of each run, and whose they are."""

    runs: tuple[tuple[jax.Array, tuple[int, ...]], ...]  # request ids by row
    behind: Mapping[int, int]
    ran: int


@dataclass(slots=True)
class _Part:
    """Tokens of one row in one run."""

    row: AskRow
    start: int
    count: int


class Drafter:
    """Owns the draft model's parameters and pages, and knows how far each slot's are right."""

    def __init__(
        self,
        params: State,
        kv_pages: list[jax.Array],
        shape: DraftShape,
        programs: Mapping[str, jax.stages.Compiled],
    ) -> None:
        self.shape = shape
        self._params, self._programs = jax.tree.leaves(params), programs
        self._kv_pages = kv_pages  # donated to every run
        pages = np.arange(shape.rows * shape.pages_per_row, dtype=np.int32)
        self._pages = pages.reshape(shape.rows, shape.pages_per_row)
        self._row_of: OrderedDict[int, int] = OrderedDict()  # by slot, longest unused first
        # By slot: positions whose keys and values are right, as far as they have agreed since.
        self._valid: dict[int, int] = {}

    def draft(self, ask: Ask, history: jax.Array) -> tuple[jax.Array, Drafting]:
        """Dispatch all runs; `history` is donated, and comes back with what was drafted."""
        assert len(ask.rows) <= self.shape.rows, "more sequences than rows"
        for row in ask.rows:
            self._place(row)
        parts, ready = self._catch_up(ask)
        runs: list[tuple[jax.Array, tuple[int, ...]]] = []
        history, tokens = self._run(parts, ready, history)
        runs.append((tokens, tuple(row.request_id for row in ready)))
        ran = sum(part.count for part in parts)
        for more in range(1, max((row.count for row in ready), default=0)):
            ready = [row for row in ready if row.count > more]
            singles = [_Part(row, row.known + more - 1, 1) for row in ready]
            history, tokens = self._run(singles, ready, history, more)
            runs.append((tokens, tuple(row.request_id for row in ready)))
            ran += len(ready)
        behind = {row.request_id: max(0, row.known - self._valid[row.slot]) for row in ask.rows}
        return history, Drafting(tuple(runs), behind, ran)

    def _place(self, row: AskRow) -> None:
        """A row of pages for the slot, and what in them is right."""
        if row.slot not in self._row_of:
            taken = len(self._row_of)
            if taken == self.shape.rows:
                oldest, taken = self._row_of.popitem(last=False)
                self._valid.pop(oldest, None)
            self._row_of[row.slot] = taken
        self._row_of.move_to_end(row.slot)
        # The last known token is always run, for what follows it.
        right = min(self._valid.get(row.slot, 0), row.agreed, row.known - 1)
        self._valid[row.slot] = right

    def _catch_up(self, ask: Ask) -> tuple[list[_Part], list[AskRow]]:
        """The first run, those who lack least first: parts, and whose known tokens end in it."""
        left = self.shape.token_buckets[-1]
        parts: list[_Part] = []
        ready: list[AskRow] = []
        for row in sorted(ask.rows, key=lambda row: row.known - self._valid[row.slot]):
            start = self._valid[row.slot]
            count = min(row.known - start, left)
            if count:
                parts.append(_Part(row, start, count))
                left -= count
            if start + count == row.known:
                ready.append(row)
        return parts, ready

    def _run(
        self, parts: list[_Part], ready: list[AskRow], history: jax.Array, more: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """`ready` are the first of `parts`, whose next tokens are wanted; those with one token
        stand first."""
        rows = self.shape.rows
        slots, kv_lens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        cu_q_lens, table = np.zeros(rows + 1, np.int32), np.zeros_like(self._pages)
        tokens = sum(part.count for part in parts)
        bucket = next(size for size in self.shape.token_buckets if size >= tokens)
        count = self.shape.ends(bucket)
        ends = Rows(
            np.zeros(count, np.int32),
            np.full(count, self.shape.max_slots, np.int32),
            np.zeros(count, np.int32),
        )
        ones = 0
        for i, part in enumerate(parts):
            slot, end = part.row.slot, part.start + part.count
            slots[i], kv_lens[i], table[i] = slot, end, self._pages[self._row_of[slot]]
            cu_q_lens[i + 1] = cu_q_lens[i] + part.count
            ones += part.count == 1 and ones == i  # a last one may be cut to one token
            self._valid[slot] = end
            if i < len(ready):
                ends.hidden[i], ends.slots[i] = cu_q_lens[i + 1] - 1, slot
                ends.positions[i] = part.row.known + more
        cu_q_lens[len(parts) + 1 :] = tokens
        batch = Batch(slots, kv_lens, table, cu_q_lens, np.array([ones, len(parts)], np.int32))
        program: Any = self._programs[f"draft[{bucket}]"]
        self._kv_pages, history, drawn = program(self._params, self._kv_pages, history, batch, ends)
        return history, drawn
