"""One token from each row of logits: the highest, or one by chance. Knows no slot and no history.

A pass over a vocabulary is what costs here, on a CPU above all: so nothing is sorted, no noise is
drawn, and no array of that size is made where a sum will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

CANDIDATES = 64  # a top_k or top_p cut within so many is found without a search
_LANES = 512  # a row of logits is folded into so many
_ATTEMPTS = 16  # at a draw that a deep top_p allows, until its cut is searched for after all


type Attempts = tuple[jax.Array, jax.Array, jax.Array]  # how many, tokens, and which will do


class Rules(Protocol):
    """Of each row, [rows]; temperature 0: it is not drawn by chance, and the rest means nothing."""

    @property
    def temperature(self) -> jax.Array: ...
    @property
    def top_p(self) -> jax.Array: ...
    @property
    def min_p(self) -> jax.Array: ...
    @property
    def top_k(self) -> jax.Array: ...
    @property
    def seed(self) -> jax.Array: ...


def _folded(values: jax.Array, fill: float = -jnp.inf) -> jax.Array:
    """[rows, vocab] as [rows, columns, lanes], token = column * lanes + lane; `fill` behind it.

    What is taken along the last axis is not vectorised on a CPU, and along the columns it is.
    """
    rows, vocab = values.shape
    lanes = math.gcd(vocab, _LANES)
    if lanes < _LANES // 8:  # an odd vocabulary: better one copy of it than single lanes
        lanes = _LANES
        values = jnp.pad(values, ((0, 0), (0, -vocab % lanes)), constant_values=fill)
    return values.reshape(rows, -1, lanes)


def highest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest of each row, NaN where there is one, and the first token that has it: searched
    for in the one lane that has it."""
    folded = _folded(logits)
    _, columns, lanes = folded.shape
    by_lane = jnp.max(folded, axis=1)
    best = jnp.max(by_lane, axis=1)
    has_it = by_lane == best[:, None]
    index = jnp.arange(columns * lanes, dtype=jnp.int32).reshape(columns, lanes)

    def in_one_lane() -> jax.Array:
        lane = jnp.argmax(has_it, axis=1)
        column = jnp.take_along_axis(folded, lane[:, None, None], axis=2)[:, :, 0]
        return jnp.argmax(column == best[:, None], axis=1).astype(jnp.int32) * lanes + lane

    def anywhere() -> jax.Array:
        return jnp.min(
            jnp.where(folded == best[:, None, None], index, logits.shape[-1] - 1), axis=(1, 2)
        )

    tied = jnp.any(jnp.sum(has_it, axis=1) != 1)
    tokens: jax.Array = lax.cond(tied, anywhere, in_one_lane)
    # Looked for by itself: a CPU's maximum of a NaN and a number may be the number.
    is_nan = jnp.any(jnp.any(folded != folded, axis=1), axis=1)
    return jnp.where(is_nan, jnp.nan, best), tokens.astype(jnp.int32)


def random_bits(seed: jax.Array, position: jax.Array) -> jax.Array:
    """[2] uint32, all chance there is for one token."""
    return jax.random.bits(jax.random.fold_in(jax.random.key(seed), position), (2,), jnp.uint32)


def draw(shaped: jax.Array, best: jax.Array, rules: Rules, positions: jax.Array) -> jax.Array:
    """Temperature, then min_p, top_k and top_p cuts, then one draw from what is left. Exact.

    A top_p cut that lies deep is not searched for: a token is drawn from all, and drawn again
    while those above it make up top_p without it.
    """
    heat = jnp.where(rules.temperature > 0, rules.temperature, 1)
    folded = _folded(shaped)

    def heated(logits: jax.Array) -> jax.Array:  # of any shape [rows, ...]
        return (logits - _beside(best, logits)) / _beside(heat, logits)

    floor, most = jnp.log(rules.min_p), jnp.full(heat.shape, jnp.inf)  # -inf keeps all
    is_cut = ((rules.top_k > 0) | (rules.top_p < 1)) & (rules.temperature > 0)
    floor, most = lax.cond(
        jnp.any(is_cut), lambda: _cut(heated(shaped), floor, rules), lambda: (floor, most)
    )

    def weigh(logits: jax.Array, floor: jax.Array = floor) -> jax.Array:
        hot = heated(logits)
        kept: jax.Array = jnp.where(hot >= _beside(floor, hot), jnp.exp(hot), 0)
        return kept

    def drawn(attempt: jax.Array | int, weigh: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.uniform(jax.random.fold_in(key, attempt))

        return _pick(folded, weigh, jax.vmap(uniform)(rules.seed, positions))

    def fits(tokens: jax.Array) -> jax.Array:
        own_logit = jnp.take_along_axis(shaped, tokens[:, None], axis=-1)[:, 0]
        higher = jnp.where(folded > _beside(own_logit, folded), weigh(folded), 0)
        enough: jax.Array = jnp.sum(jnp.sum(higher, axis=1), axis=-1) < most
        return enough

    def again(state: Attempts) -> Attempts:
        attempt, tokens, done = state
        tokens = jnp.where(done, tokens, drawn(attempt, weigh))
        return attempt + 1, tokens, done | fits(tokens)

    def redrawn(tokens: jax.Array) -> jax.Array:
        start = (jnp.int32(1), tokens, fits(tokens))
        _, tokens, done = lax.while_loop(
            lambda state: (state[0] < _ATTEMPTS) & ~jnp.all(state[2]), again, start
        )

        def searched() -> jax.Array:
            hot = heated(shaped)
            kept = jnp.where(hot >= floor[:, None], jnp.exp(hot), 0)
            lowest = _search(hot, lambda above: jnp.where(above, kept, 0), most)
            deeper = jnp.maximum(floor, lowest)
            return jnp.where(done, tokens, drawn(0, partial(weigh, floor=deeper)))

        found: jax.Array = lax.cond(jnp.all(done), lambda: tokens, searched)
        return found

    first = drawn(0, weigh)
    tokens: jax.Array = lax.cond(jnp.any(jnp.isfinite(most)), redrawn, lambda x: x, first)
    return tokens


def _beside(of_rows: jax.Array, array: jax.Array) -> jax.Array:
    """[rows] with as many axes as `array`, [rows, ...]."""
    return jnp.expand_dims(of_rows, range(1, array.ndim))


def _cut(logits: jax.Array, floor: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """The lowest logit [rows] that top_k and then top_p keep, not below `floor`.

    Both are found among the best CANDIDATES. A top_k that lies deeper is searched for; of a top_p
    that does, the second result says how much weight may lie above a token, elsewhere it is inf.
    """
    vocab = logits.shape[-1]
    count = min(CANDIDATES, vocab)
    best, _ = lax.top_k(logits, count)
    wanted = jnp.where(rules.top_k > 0, jnp.minimum(rules.top_k, vocab), vocab)

    def deep_k() -> jax.Array:
        return _search(logits, lambda kept: kept.astype(jnp.float32), wanted.astype(jnp.float32))

    kth = jnp.take_along_axis(best, jnp.minimum(wanted, count)[:, None] - 1, axis=-1)[:, 0]
    is_deep = (rules.top_k > 0) & (wanted > count)
    kth = jnp.where(is_deep, lax.cond(jnp.any(is_deep), deep_k, lambda: kth), kth)
    floor = jnp.where(rules.top_k > 0, jnp.maximum(floor, kth), floor)

    goal = rules.top_p * _total(jnp.where(logits >= floor[:, None], jnp.exp(logits), 0))
    mass = jnp.cumsum(jnp.where(best >= floor[:, None], jnp.exp(best), 0), axis=-1)
    enough = jnp.sum(mass < goal[:, None], axis=-1)  # how many fall short
    pth = jnp.take_along_axis(best, jnp.minimum(enough, count - 1)[:, None], axis=-1)[:, 0]
    is_near = (rules.top_p < 1) & (enough < count)
    is_far = (rules.top_p < 1) & (enough >= count)
    return jnp.where(is_near, jnp.maximum(floor, pth), floor), jnp.where(is_far, goal, jnp.inf)


def _search(
    logits: jax.Array, measure: Callable[[jax.Array], jax.Array], goal: jax.Array
) -> jax.Array:
    """The highest threshold [rows] whose kept entries measure up to `goal` [rows].

    Bisection over the 32 bits of a float in numerical order, so it is exact, ties included.
    """

    def to_float(order: jax.Array) -> jax.Array:
        bits = order ^ ((order >> 31) & 0x7FFFFFFF)
        return lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low measures up, high does not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        above = logits >= to_float(middle)[:, None]
        fits = _total(measure(above)) >= goal
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    rows = goal.shape
    lowest = jnp.full(rows, -(2**31) + 0x00800000, jnp.int32)  # the order of -inf
    highest = jnp.full(rows, 1, jnp.int32)  # above the best, which is 0
    return to_float(lax.fori_loop(0, 32, halve, (lowest, highest))[0])


def _total(values: jax.Array) -> jax.Array:
    """The sum of each row of [rows, vocab]."""
    return jnp.sum(jnp.sum(_folded(values, 0), axis=1), axis=-1)


def _pick(
    folded: jax.Array, weigh: Callable[[jax.Array], jax.Array], uniform: jax.Array
) -> jax.Array:
    """The token in which uniform [rows] times the sum of all weights falls, lane by lane and then
    column by column, so that neither weights nor running sums of a vocabulary are kept."""
    lane_sums = jnp.sum(weigh(folded), axis=1)
    sums = jnp.cumsum(lane_sums, axis=-1)
    target = uniform * sums[:, -1]
    lane = _first(sums > target[:, None], lane_sums > 0)
    column = weigh(jnp.take_along_axis(folded, lane[:, None, None], axis=2)[:, :, 0])
    before = jnp.take_along_axis(sums - lane_sums, lane[:, None], axis=1)
    inside = jnp.cumsum(column, axis=-1) > target[:, None] - before
    return _first(inside, column > 0) * folded.shape[2] + lane


def _first(reached: jax.Array, possible: jax.Array) -> jax.Array:
    """Index of the first entry reached, or of the last possible one where rounding reached none."""
    index = jnp.arange(possible.shape[-1], dtype=jnp.int32)
    last = jnp.max(jnp.where(possible, index, 0), axis=-1)
    found = jnp.min(jnp.where(reached & possible, index, possible.shape[-1]), axis=-1)
    return jnp.minimum(found, last)
