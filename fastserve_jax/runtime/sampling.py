"""Drawing tokens on the device, each row by its own rules. Knows rows and slots, not requests.

Everything a row needs lies in `SlotState`, written once when a sequence takes its slot, so a step
sends no sampling arrays. A token's key is fold_in(seed, position): a seeded sample never depends
on its neighbours. Rare work (penalties, logprobs, exact cuts deep in the vocabulary) stands behind
`lax.cond` and costs nothing while no row asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastserve_jax.core.types import MAX_TOP_LOGPROBS, Admission
from pallas_kernels import cpu

from . import pick

MAX_BIASES = 352  # 300 of logit_bias, the rest stop ids held back by min_tokens


class SlotState(NamedTuple):
    """What the device keeps per slot. `history` holds every token, given or drawn, by position."""

    history: jax.Array  # [slots, max_context] int32
    temperature: jax.Array  # [slots] float32, and so on
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    top_k: jax.Array  # [slots] int32
    seed: jax.Array  # [slots] uint32
    prompt_tokens: jax.Array  # [slots] int32
    counted: jax.Array  # [slots] int32: position from which repetition counts
    logprobs: jax.Array  # [slots] bool
    bias_ids: jax.Array  # [slots, MAX_BIASES] int32; vocab_size where unused
    bias_values: jax.Array  # [slots, MAX_BIASES] float32
    bias_until: jax.Array  # [slots, MAX_BIASES] int32: position from which the bias is off


class Drawn(NamedTuple):
    """tokens [rows] int32, -1 where the logits were not finite; the rest only where asked for."""

    tokens: jax.Array
    logprobs: jax.Array  # [rows] float32, of the token
    top_ids: jax.Array  # [rows, MAX_TOP_LOGPROBS] int32
    top_logprobs: jax.Array  # [rows, MAX_TOP_LOGPROBS] float32


def empty_state(slots: int, max_context: int, vocab_size: int) -> SlotState:
    floats, ints = np.zeros(slots, np.float32), np.zeros(slots, np.int32)
    return SlotState(
        history=jnp.zeros((slots, max_context), jnp.int32),
        temperature=jnp.array(floats),
        top_p=jnp.array(floats + 1),
        min_p=jnp.array(floats),
        repetition=jnp.array(floats + 1),
        presence=jnp.array(floats),
        frequency=jnp.array(floats),
        top_k=jnp.array(ints),
        seed=jnp.array(ints.astype(np.uint32)),
        prompt_tokens=jnp.array(ints),
        counted=jnp.array(ints),
        logprobs=jnp.array(ints.astype(np.bool_)),
        bias_ids=jnp.full((slots, MAX_BIASES), vocab_size, jnp.int32),
        bias_values=jnp.zeros((slots, MAX_BIASES), jnp.float32),
        bias_until=jnp.zeros((slots, MAX_BIASES), jnp.int32),
    )


type SlotRow = tuple[np.ndarray | np.generic, ...]  # one slot of each SlotState array, in order


def slot_row(admission: Admission, max_context: int, vocab_size: int, counted: int = 0) -> SlotRow:
    """Of `admission`, whose repetitions count from position `counted` on."""
    sampling = admission.sampling
    history = np.zeros(max_context, np.int32)
    history[: len(admission.tokens)] = admission.tokens
    ids = np.full(MAX_BIASES, vocab_size, np.int32)
    values, until = np.zeros(MAX_BIASES, np.float32), np.zeros(MAX_BIASES, np.int32)
    biases = [(token, value, max_context) for token, value in sampling.logit_bias]
    if sampling.min_tokens:
        free_from = admission.prompt_tokens + sampling.min_tokens
        biases += [(token, -np.inf, free_from) for token in sorted(sampling.stop_ids)]
    assert len(biases) <= MAX_BIASES, "the wire layer bounds logit_bias and stop ids"
    for i, bias in enumerate(biases):
        ids[i], values[i], until[i] = bias
    row: dict[str, np.ndarray | np.generic] = {
        "history": history,
        "temperature": np.float32(sampling.temperature),
        "top_p": np.float32(sampling.top_p),
        "min_p": np.float32(sampling.min_p),
        "repetition": np.float32(sampling.repetition_penalty),
        "presence": np.float32(sampling.presence_penalty),
        "frequency": np.float32(sampling.frequency_penalty),
        "top_k": np.int32(sampling.top_k),
        "seed": np.uint32(sampling.seed),
        "prompt_tokens": np.int32(admission.prompt_tokens),
        "counted": np.int32(counted),
        "logprobs": np.bool_(sampling.logprobs is not None),
        "bias_ids": ids,
        "bias_values": values,
        "bias_until": until,
    }
    return tuple(row[name] for name in SlotState._fields)


def admit(state: SlotState, slot: jax.Array, row: tuple[jax.Array, ...]) -> SlotState:
    return SlotState(*(whole.at[slot].set(part) for whole, part in zip(state, row, strict=True)))


class _Own(NamedTuple):
    """What each row of a step asks for."""

    state: SlotState  # of its slot; zeros for padding
    biased: jax.Array  # [rows, MAX_BIASES] bool: biases in force
    penalised: jax.Array  # [rows] bool
    is_drawn: jax.Array  # [rows] bool: by chance, not the best


def _own(state: SlotState, slots: jax.Array, positions: jax.Array, vocab: int) -> _Own:
    real = slots < state.seed.shape[0]
    rest = (array.at[slots].get(mode="fill", fill_value=0) for array in state[1:])
    own = SlotState(state.history, *rest)
    biased = (own.bias_ids < vocab) & (own.bias_until > positions[:, None])
    penalised = (own.repetition != 1) | (own.presence != 0) | (own.frequency != 0)
    return _Own(own, biased, penalised & real, own.temperature > 0)


def draw_from(
    logits: Callable[[], jax.Array],
    best: Callable[[], tuple[jax.Array, jax.Array] | None],
    chance: Callable[[cpu.Rules], tuple[jax.Array, jax.Array]] | None,
    vocab: int,
    state: SlotState,
    slots: jax.Array,
    positions: jax.Array,
) -> Drawn:
    """`draw`, of logits that are made in the branch that needs them. Where nobody asks for more
    than a token, they are not even that: `best` gives each row's highest logit and its token, or
    None, and `chance`, where there is one, tokens by rules."""
    own = _own(state, slots, positions, vocab)
    is_drawn = jnp.any(own.is_drawn)
    asked = jnp.any(own.biased) | jnp.any(own.penalised) | jnp.any(own.state.logprobs)

    def plain() -> Drawn:
        return _only(*(best() or pick.highest(logits())))

    def whole() -> Drawn:
        return draw(logits(), state, slots, positions)

    def fused() -> Drawn:
        assert chance is not None
        rules = _rules(own, positions)
        drawn: Drawn = lax.cond(is_drawn, lambda: _only(*chance(rules)), plain)
        return drawn

    drawn: Drawn
    if chance is None:
        drawn = lax.cond(asked | is_drawn, whole, plain)
    else:
        drawn = lax.cond(asked, whole, fused)
    return drawn


def _only(best: jax.Array, tokens: jax.Array) -> Drawn:
    return Drawn(jnp.where(jnp.isfinite(best), tokens, -1), *_unscored(len(tokens)))


def _rules(own: _Own, positions: jax.Array) -> cpu.Rules:
    of = own.state
    bits = jax.vmap(pick.random_bits)(of.seed, positions)
    return cpu.Rules(of.temperature, of.top_p, of.min_p, of.top_k, bits)


def draw(logits: jax.Array, state: SlotState, slots: jax.Array, positions: jax.Array) -> Drawn:
    """One token per row for `positions` [rows] (where it will stand), from logits [rows, vocab].

    `slots` [rows]; one out of range is padding, behind all others: its token means nothing.
    """
    asks = _own(state, slots, positions, logits.shape[-1])
    own, biased, penalised, is_drawn = asks

    def choose(shaped: jax.Array) -> tuple[jax.Array, jax.Array]:
        if cpu.runs():
            live = jnp.sum(slots < state.seed.shape[0], dtype=jnp.int32)  # they stand first
            return cpu.draw(shaped, live, _rules(asks, positions))
        best, greedy = pick.highest(shaped)
        sampled = lax.cond(
            jnp.any(is_drawn), lambda: pick.draw(shaped, best, own, positions), lambda: greedy
        )
        return best, jnp.where(is_drawn, sampled, greedy)

    # Not logits that come out of a cond: they would be copied, changed or not.
    best, tokens = lax.cond(
        jnp.any(biased) | jnp.any(penalised),
        lambda: choose(_penalise(_bias(logits, own, biased), own, slots, positions)),
        lambda: choose(logits),
    )
    scored = lax.cond(
        jnp.any(own.logprobs), lambda: score(logits, tokens), lambda: _unscored(len(slots))
    )
    return Drawn(jnp.where(jnp.isfinite(best), tokens, -1), *scored)


def score(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of `tokens` [rows] and of each row's best, from the model's own logits."""
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])
    top, ids = lax.top_k(logits, count)
    spare = ((0, 0), (0, MAX_TOP_LOGPROBS - count))
    return (
        chosen - total,
        jnp.pad(ids, spare, constant_values=-1),
        jnp.pad(top - total[:, None], spare, constant_values=-jnp.inf),
    )


def _unscored(rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    top = (rows, MAX_TOP_LOGPROBS)
    return jnp.zeros(rows), jnp.zeros(top, jnp.int32), jnp.zeros(top)


def _bias(logits: jax.Array, own: SlotState, active: jax.Array) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, own.bias_ids].add(jnp.where(active, own.bias_values, 0), mode="drop")


def _penalise(
    logits: jax.Array, own: SlotState, slots: jax.Array, positions: jax.Array
) -> jax.Array:
    """Repetition (Keskar et al., CTRL, section 4.1), then presence and frequency as OpenAI does.

    Each is a gather and a scatter at the tokens of the history; no count per vocabulary entry.
    """
    vocab = logits.shape[-1]
    history = own.history.at[slots].get(mode="clip")
    at = jnp.arange(history.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    known = jnp.where((at >= own.counted[:, None]) & (at < positions[:, None]), history, vocab)
    output = jnp.where(at >= own.prompt_tokens[:, None], known, vocab)
    # Once per distinct token: duplicates gather the same value and so set the same one.
    old = logits.at[rows, known].get(mode="fill", fill_value=0)
    factor = own.repetition[:, None]
    logits = logits.at[rows, known].set(jnp.where(old > 0, old / factor, old * factor), mode="drop")
    old = logits.at[rows, output].get(mode="fill", fill_value=0)
    logits = logits.at[rows, output].set(old - own.presence[:, None], mode="drop")
    # Once per occurrence.
    times = jnp.broadcast_to(-own.frequency[:, None], output.shape)
    return logits.at[rows, output].add(times, mode="drop")
