"""The programs of a step: what is compiled, for which shapes, and nothing about when to run them.

    admit            a sequence takes a slot
    forward[tokens]  new tokens through the decoder; keys and values into their pages
    sample[rows]     head and draw for the rows that end a sequence; the token goes to its history
    adapted[tokens]  forward, where there is room for adapters and a row has one
    adapt            a set of adapters takes its place among the others
    score            head and log-probabilities for prompt tokens, in blocks, any number
    guess            tokens that may come are put into histories; where any are guessed
    swap_out, _in    where there is a host tier: see host.py

Tokens are read from the slots' histories and drawn ones written back there, so a step follows
another without the host knowing what was drawn. Forward is bucketed by tokens and sample by rows:
the number of programs is a sum, not a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fastserve_jax.core.types import MAX_TOP_LOGPROBS
from fastserve_jax.models.adapters import (
    NO_ROOM,
    AdapterRoom,
    Adapters,
    empty_adapters,
    own_columns,
    put,
)
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import (
    Batch,
    Decoder,
    State,
    all_axes,
    axes_of,
    head_of,
    place,
)
from fastserve_jax.models.layers import Matrix, best_output, drawn_output, project
from fastserve_jax.models.parts import WHOLE, Parts
from fastserve_jax.models.seq2seq import Seq2Seq
from pallas_kernels import KVLayout, target

from . import sampling
from .host import HostLayout, swap_programs
from .mesh import HOST, PAGES, REPLICAS, spec_of, zeros
from .sampling import Drawn, SlotState
from .shapes import Program, abstract, by_leaves, ints, like

SMALLEST_BUCKET = 4  # XLA:CPU multiplies one row 10 times slower than four
SCORE_ROWS = 32  # rows of logits held at once while scoring a prompt


@dataclass(frozen=True, slots=True)
class StepShape:
    """The bounds that every program is compiled for."""

    max_slots: int
    step_tokens: int
    max_context: int
    page_size: int
    num_pages: int
    host_pages: int = 0  # 0: no host tier
    guesses: int = 0  # tokens that a row may run ahead of what is known; 0: none
    adapters: AdapterRoom = NO_ROOM
    encodes: bool = False  # prompts are sources, which an encoder reads

    @property
    def pages_per_row(self) -> int:
        return -(-self.max_context // self.page_size)

    @property
    def token_buckets(self) -> tuple[int, ...]:
        return buckets(self.step_tokens)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return buckets(max(self.max_slots, 1 + self.guesses))

    def layout(self, config: ModelConfig) -> KVLayout:
        pages, heads = self.num_pages, config.num_kv_heads
        return KVLayout(pages, heads, self.page_size, config.head_dim, target().lanes)

    def host_layout(self, config: ModelConfig) -> HostLayout:
        page_elements = math.prod(self.layout(config).shape[1:])
        return HostLayout(self.host_pages, config.num_layers, page_elements)


def buckets(largest: int) -> tuple[int, ...]:
    """SMALLEST_BUCKET and powers of two from 16, up to `largest` itself.

    A size costs a second of every start; 8 would save little against 16, which is not slower by
    half.
    """
    sizes = [SMALLEST_BUCKET]
    size = 16
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest) if largest > SMALLEST_BUCKET else (SMALLEST_BUCKET,)


def empty_pages(
    config: ModelConfig, shape: StepShape, dtype: DTypeLike, mesh: Mesh | None = None
) -> list[jax.Array]:
    """One array per layer, as KVLayout says; over a mesh, of what each device has of `config`."""
    layout = shape.layout(config).shape
    if mesh is None:
        return [jnp.zeros(layout, dtype) for _ in range(config.num_layers)]
    return zeros(mesh, PAGES, layout, dtype, config.num_layers)


class Rows(NamedTuple):
    """Rows of hidden states whose next token is wanted, all [rows] int32; padding: slot too big."""

    hidden: jax.Array | np.ndarray  # index of each
    slots: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray  # where the next token stands


class Scores(NamedTuple):
    """Over `step_tokens` rows; what lies beyond the rows asked for means nothing."""

    logprobs: jax.Array  # [rows] float32
    top_ids: jax.Array  # [rows, MAX_TOP_LOGPROBS] int32
    top_logprobs: jax.Array  # [rows, MAX_TOP_LOGPROBS] float32


for _kind in (SlotState, Drawn, Scores):  # what comes out of programs that are kept
    export.register_namedtuple_serialization(
        _kind, serialized_name=f"fastserve_jax.{_kind.__name__}"
    )


@dataclass(frozen=True)
class Steps:
    """The functions of one model, to be compiled; pure but for what is donated. Those of a part, if
    there are several: for its share of the heads, and with all slots."""

    graph: nnx.GraphDef[Decoder] | nnx.GraphDef[Seq2Seq]
    config: ModelConfig  # of the whole
    shape: StepShape
    parts: Parts = WHOLE

    @property
    def own(self) -> ModelConfig:
        return self.parts.of(self.config)

    def forward(
        self,
        params: State,
        kv_pages: list[jax.Array],
        history: jax.Array,
        batch: Batch,
        adapters: Adapters | None = None,
        of_rows: jax.Array | None = None,
        *,
        tokens: int,
    ) -> tuple[list[jax.Array], jax.Array]:
        """-> pages (donated through), hidden [largest bucket, hidden_size] whatever the bucket.
        `of_rows` [rows] int32 is each row's adapter, from 1, 0 for none."""
        at = place(batch, tokens, self.shape.layout(self.own))
        given = history[jnp.asarray(batch.slots)[at.rows], at.positions]
        model = nnx.merge(self.graph, params)
        adapted: tuple[Any, ...] = ()
        if of_rows is not None:
            adapted = adapters, own_columns(of_rows[at.rows], self.shape.adapters)
        hidden, kv_pages = model(given, kv_pages, batch, at, *adapted)
        spare = self.shape.token_buckets[-1] - tokens
        return kv_pages, jnp.pad(hidden, ((0, spare), (0, 0)))

    def sample(
        self, head: Matrix, state: SlotState, hidden: jax.Array, rows: Rows
    ) -> tuple[SlotState, Drawn]:
        slots, positions = jnp.asarray(rows.slots), jnp.asarray(rows.positions)
        chosen = hidden[rows.hidden]
        live = jnp.sum(slots < state.seed.shape[0], dtype=jnp.int32)  # they stand first
        vocab, is_whole = self.config.vocab_size, self.parts.count == 1
        drawn = sampling.draw_from(
            lambda: self.parts.joined(project(chosen, head, live), vocab),
            lambda: best_output(chosen, head, live) if is_whole else None,
            drawn_output(chosen, head, live) if is_whole else None,
            vocab,
            state,
            slots,
            positions,
        )
        history = state.history.at[slots, positions].set(drawn.tokens, mode="drop")
        return state._replace(history=history), drawn

    def score(
        self, head: Matrix, history: jax.Array, hidden: jax.Array, rows: Rows, count: jax.Array
    ) -> Scores:
        """The first `count` of `rows`, each row's `positions` naming the token it is scored on."""
        total = self.shape.step_tokens
        padded = -(-total // SCORE_ROWS) * SCORE_ROWS
        index, slots, positions = (jnp.pad(jnp.asarray(x), (0, padded - total)) for x in rows)

        def block(i: jax.Array, scores: Scores) -> Scores:
            at = [lax.dynamic_slice_in_dim(x, i * SCORE_ROWS, SCORE_ROWS) for x in (index, slots)]
            where = lax.dynamic_slice_in_dim(positions, i * SCORE_ROWS, SCORE_ROWS)
            given = history.at[at[1], where].get(mode="clip")
            logits = project(hidden[at[0]], head, SCORE_ROWS)
            new = sampling.score(self.parts.joined(logits, self.config.vocab_size), given)
            update = lax.dynamic_update_slice_in_dim
            return Scores(
                *(update(a, b, i * SCORE_ROWS, 0) for a, b in zip(scores, new, strict=True))
            )

        top = (padded, MAX_TOP_LOGPROBS)
        start = Scores(jnp.zeros(padded), jnp.zeros(top, jnp.int32), jnp.zeros(top))
        scores: Scores = lax.fori_loop(0, (count + SCORE_ROWS - 1) // SCORE_ROWS, block, start)
        return scores


def guess(
    history: jax.Array, slots: jax.Array, positions: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Tokens that may come, each at its place; padding: slot too big."""
    return history.at[slots, positions].set(tokens, mode="drop")


def programs(steps: Steps, params: State, dtype: DTypeLike) -> Iterator[Program]:
    """Every one; those that compile longest first.

    Of `params` only shapes are read.
    """
    shape, config = steps.shape, steps.config
    state = jax.eval_shape(
        lambda: sampling.empty_state(shape.max_slots, shape.max_context, config.vocab_size)
    )
    layout = shape.layout(steps.own)
    kv_pages = [like(layout.shape, dtype) for _ in range(config.num_layers)]
    hidden = like((shape.token_buckets[-1], config.hidden_size), dtype)
    head = jax.tree.map(abstract, head_of(config, params))
    head_divided = head_of(config, params, lambda variable: spec_of(axes_of(variable)))
    yield from _forwards(steps, params, kv_pages, state.history, dtype)
    for count in shape.row_buckets:
        rows = Rows(ints(count), ints(count), ints(count))
        drawn_from = (head, state, hidden, rows)
        of_rows = (head_divided, REPLICAS, REPLICAS, HOST), (REPLICAS, HOST)
        yield Program(f"sample[{count}]", steps.sample, drawn_from, donated=(1,), specs=of_rows)

    rows = Rows(*[ints(shape.step_tokens)] * 3)
    yield Program(
        "score",
        steps.score,
        (head, state.history, hidden, rows, ints()),
        specs=((head_divided, REPLICAS, REPLICAS, HOST, HOST), HOST),
    )
    if shape.guesses:
        guessed = (state.history, *[ints(shape.row_buckets[-1])] * 3)
        yield Program(
            "guess", guess, guessed, donated=(0,), specs=((REPLICAS, HOST, HOST, HOST), REPLICAS)
        )
    slot_row = tuple(like(x.shape[1:], x.dtype) for x in state)
    yield Program(
        "admit",
        sampling.admit,
        (state, ints(), slot_row),
        donated=(0,),
        specs=((REPLICAS, HOST, HOST), REPLICAS),
    )
    yield from swap_programs(shape.host_layout(steps.own), kv_pages, jax.devices()[0])


def _forwards(
    steps: Steps, params: State, kv_pages: list[Any], history: Any, dtype: DTypeLike
) -> Iterator[Program]:
    shape, slots = steps.shape, steps.shape.max_slots
    table, sources = ints(slots, shape.pages_per_row), ints(slots) if shape.encodes else None
    batch = Batch(ints(slots), ints(slots), table, ints(slots + 1), ints(2), sources)
    leaves, forward = by_leaves(steps.forward, params)
    specs = ([spec_of(axes) for axes in all_axes(params)], PAGES, REPLICAS, HOST)
    given, of_all = (leaves, kv_pages, history, batch), (specs, (PAGES, REPLICAS))
    for tokens in reversed(shape.token_buckets):
        of_bucket = partial(forward, tokens=tokens)
        yield Program(f"forward[{tokens}]", of_bucket, given, donated=(1,), specs=of_all)
    if not shape.adapters.count:
        return
    rooms = (shape.adapters, AdapterRoom(1, shape.adapters.rank))
    adapters, one = (
        jax.eval_shape(partial(empty_adapters, steps.config, room, dtype)) for room in rooms
    )
    for tokens in reversed(shape.token_buckets):
        of_bucket, adapted = partial(forward, tokens=tokens), (adapters, ints(slots))
        yield Program(f"adapted[{tokens}]", of_bucket, (*given, *adapted), donated=(1,))
    yield Program("adapt", put, (adapters, ints(), one), donated=(0,))
