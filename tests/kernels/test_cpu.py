"""The CPU's kernels against numpy in float64, and each row against itself alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from fastserve_jax.models.decoder import Batch, place
from fastserve_jax.models.layers import rope_frequencies, rotate, rotation
from fastserve_jax.models.spread import spreading
from pallas_kernels import cases, cpu

from .rows import build, oracle

pytestmark = pytest.mark.skipif(not cpu.runs(), reason=f"no kernels here: {cpu.missing()}")

SHAPES = [(1, 1000, 640), (2, 77, 576), (3, 5, 48), (4, 4096, 640), (6, 50, 70), (33, 640, 2048)]


def matrix(rng, outputs, size):
    weight = rng.integers(-127, 128, (outputs, size)).astype(np.int8)
    return weight, (rng.random(outputs) * 0.01).astype(np.float32)


def product(x, weight, scale):
    """What int8_matmul says it does, in float64 up to the rounding of x."""
    turn = spreading(x.shape[1]).astype(np.float64)
    x = (x.astype(np.float64).reshape(-1, len(turn)) @ turn).reshape(x.shape)
    row_scale = np.abs(x).max(1, keepdims=True) / 127
    rows = np.rint(x / row_scale)
    return rows @ weight.T.astype(np.float64) * row_scale * scale


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def gated(kind, x):
    left, right = np.split(x.astype(np.float64), 2, axis=1)
    bend = np.tanh(np.sqrt(2 / np.pi) * (left + 0.044715 * left**3))
    return right * (left / (1 + np.exp(-left)) if kind == "silu" else left * (1 + bend) / 2)


def assert_close(made, wanted):
    """A value that lies on the border of two roundings may go to either."""
    assert np.isfinite(np.asarray(made)).all()
    assert np.abs(np.asarray(made) - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(("rows", "outputs", "size"), SHAPES)
def test_a_product_is_that_of_the_rounded_rows(rows, outputs, size):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, size), np.float32) * 3
    weight, scale = matrix(rng, outputs, size)
    made = cpu.int8_matmul(x, weight, scale, jnp.int32(rows))
    wanted = product(x, weight, scale)
    assert_close(made, wanted)
    off = np.abs(np.asarray(made) - wanted) > 1e-5 * np.abs(wanted).max()
    assert off.any(1).mean() <= 0.5, "roundings differ at borders only"


@pytest.mark.parametrize("weight_type", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "size"), SHAPES)
def test_norms_and_a_sum_around_a_product(rows, outputs, size, weight_type):
    rng = np.random.default_rng(rows)
    x, add = rng.standard_normal((rows, size)), rng.standard_normal((rows, outputs))
    before = jnp.asarray(rng.standard_normal(size), weight_type)
    after = jnp.asarray(rng.standard_normal(outputs), weight_type)
    weight, scale = matrix(rng, outputs, size)
    made = cpu.int8_matmul(
        jnp.asarray(x, jnp.float32),
        weight,
        scale,
        jnp.int32(rows),
        norm=cpu.Norm(before, 1e-6),
        add=jnp.asarray(add, jnp.float32),
        add_norm=cpu.Norm(after, 1e-6),
    )
    assert_close(made, add + rms(product(rms(x, before, 1e-6), weight, scale), after, 1e-6))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "outputs", "size"), SHAPES)
def test_a_gate_before_and_a_sum_after_a_product(rows, outputs, size, kind):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 2 * size), np.float32) * 4
    add = rng.standard_normal((rows, outputs), np.float32)
    weight, scale = matrix(rng, outputs, size)
    made = cpu.int8_matmul(x, weight, scale, jnp.int32(rows), gate=kind, add=jnp.asarray(add))
    assert_close(made, add + product(gated(kind, x), weight, scale))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 90), st.integers(1, 200))
def test_a_row_is_the_same_alone_and_rows_behind_the_live_are_zeros(rows, live, outputs, size):
    rng = np.random.default_rng(size)
    x = rng.standard_normal((rows, size), np.float32)
    weight, scale = matrix(rng, outputs, size)
    made = np.asarray(cpu.int8_matmul(x, weight, scale, jnp.int32(live)))
    best, index = cpu.int8_best(x, weight, scale, jnp.int32(live))
    for row in range(min(rows, live)):
        alone = np.asarray(cpu.int8_matmul(x[row : row + 1], weight, scale, jnp.int32(1)))
        assert (alone[0] == made[row]).all()
        assert (best[row], index[row]) == (made[row].max(), made[row].argmax())
    assert not made[live:].any()


def test_of_equals_the_first_is_best():
    weight = np.ones((5000, 64), np.int8)
    weight[4001:4003] = 3
    for rows in (1, 4, 9):
        x = np.ones((rows, 64), np.float32)
        _, index = cpu.int8_best(x, weight, np.ones(5000, np.float32), jnp.int32(rows))
        assert index.tolist() == [4001] * rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_row_that_is_not_finite_makes_itself_nan_and_no_other(rows, bad):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 640), np.float32)
    x[rows // 2, 3] = bad
    weight, scale = matrix(rng, 100, 640)
    made = np.asarray(cpu.int8_matmul(x, weight, scale, jnp.int32(rows)))
    best, _ = cpu.int8_best(x, weight, scale, jnp.int32(rows))
    is_bad = np.arange(rows) == rows // 2
    assert (np.isnan(made).all(1) == is_bad).all()
    assert (np.isnan(best) == is_bad).all()
    assert np.isfinite(made[~is_bad]).all()


FITTING = [
    case
    for case in cases.ATTENTION
    if cpu.fits(case.head_dim, jnp.bfloat16) and not (case.kv_dtype or case.soft_cap or case.sinks)
]


def around(case, arrays, normed, turned):
    """Both ways from queries, keys and values to attention and pages; the kernel's first."""
    q, kv, *rows = arrays
    rng = np.random.default_rng(7)
    heads = case.num_heads + 2 * case.num_kv_heads
    qkv = jnp.asarray(rng.standard_normal((len(q), heads, case.head_dim)) * 2, jnp.float32)
    batch = Batch(jnp.arange(len(rows[0])), *rows)
    at = place(batch, len(q), case.layout())
    weights = jnp.asarray(rng.standard_normal((2, case.head_dim)), jnp.bfloat16)
    norms = [cpu.Norm(weight, 1e-6) if normed else None for weight in weights]
    turn = rotation(at.positions, rope_frequencies(case.head_dim, 1e4, None)) if turned else None
    options = {"scale": case.head_dim**-0.5, "window": case.window}
    made = jax.jit(
        lambda kv: cpu.paged_attention(
            qkv, kv, *rows, **options, turn=turn, q_norm=norms[0], k_norm=norms[1]
        )
    )(kv)
    parts = jnp.split(qkv, [case.num_heads, case.num_heads + case.num_kv_heads], axis=1)
    for i, norm in enumerate(norms):
        if norm is not None:
            parts[i] = jnp.asarray(rms(np.asarray(parts[i], np.float64), norm.weight, norm.eps))
        if turn is not None:
            parts[i] = rotate(parts[i].astype(jnp.float32), turn)
    queries, keys, values = parts
    pages = pallas_kernels.write_kv(kv, keys, values, at.pages, at.offsets)
    return made, (oracle(queries, pages, *rows, **options)[0], pages)


@pytest.mark.parametrize(("normed", "turned"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_attention_stores_and_mixes_as_the_oracle_does(case, normed, turned):
    arrays = build(case, jnp.bfloat16)
    used = int(arrays[4][-1])
    (mixed, pages), (wanted, wanted_pages) = around(case, arrays, normed, turned)
    mixed = np.asarray(mixed)
    error = np.abs(mixed[:used] - wanted[:used].reshape(used, -1)).max()
    assert error < 2e-2 * np.abs(wanted[:used]).max()
    assert np.isfinite(mixed).all()
    assert not mixed[used:].any()
    ours, theirs = (np.asarray(x, np.float32) for x in (pages, wanted_pages))
    assert (np.isnan(ours) == np.isnan(theirs)).all(), "stored elsewhere"
    # One unit of bfloat16's last place, where the two roundings of a sum differ.
    assert np.nanmax(np.abs(ours - theirs) / (np.abs(theirs) + 0.1)) < 2**-7


def test_a_token_is_attended_alike_whatever_stands_beside_it():
    case = next(case for case in cases.ATTENTION if case.name == "gemma3_local_narrow")
    q, kv, kv_lens, table, cu_q_lens, _ = build(case, jnp.bfloat16)
    rng = np.random.default_rng(3)
    heads = case.num_heads + 2 * case.num_kv_heads
    qkv = jnp.asarray(rng.standard_normal((len(q), heads, case.head_dim)), jnp.float32)
    options = {"scale": case.head_dim**-0.5, "window": case.window}
    rows = len(case.rows)
    ones = jnp.array([sum(new == 1 for new, _ in case.rows), rows])
    together, _ = cpu.paged_attention(qkv, kv, kv_lens, table, cu_q_lens, ones, **options)
    for row, (new, _) in enumerate(case.rows):
        first, end = int(cu_q_lens[row]), int(cu_q_lens[row + 1])
        own = (kv_lens[row : row + 1], table[row : row + 1], jnp.array([0, new], jnp.int32))
        kind = jnp.array([new == 1, 1], jnp.int32)
        alone, _ = cpu.paged_attention(qkv[first:end], kv, *own, kind, **options)
        assert (np.asarray(alone) == np.asarray(together[first:end])).all(), case.rows[row]


def drawn(logits, seeds, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, live=None):
    rows = len(logits)
    rules = [np.full(rows, x, np.float32) for x in (temperature, top_p, min_p)]
    bits = np.random.default_rng(seeds).integers(0, 2**32, (rows, 2), np.uint32)
    live = jnp.int32(rows if live is None else live)
    rules = cpu.Rules(*rules, np.full(rows, top_k, np.int32), bits)
    best, tokens = cpu.draw(jnp.asarray(logits), live, rules)
    return np.asarray(best), np.asarray(tokens)


def kept(logits, temperature, top_p, min_p, top_k):
    """Which tokens may be drawn, and their weights, by sorting. float64."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-logits, kind="stable")
    may = weights >= min_p
    if 0 < top_k < len(logits):
        may &= logits >= logits[order[top_k - 1]]
    above = np.cumsum(np.where(may, weights, 0)[order])
    highest_equal = np.searchsorted(-logits[order], -logits[order], side="left")
    before = np.append(0.0, above)[highest_equal]
    may[order] &= before < top_p * above[-1]
    return np.where(may, weights, 0)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 15, 512, 700, 5120, 20011]),
    temperature=st.floats(0.05, 3.0),
    top_p=st.floats(0.0, 1.0),
    min_p=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 30, 600, 9000]),
    steps=st.sampled_from([2, 40]),
)
def test_a_draw_is_one_of_those_that_a_sort_keeps(
    seed, vocab, temperature, top_p, min_p, top_k, steps
):
    """Blocks of 512; top_k below and above their number; many ties."""
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.standard_normal((3, vocab)) * steps) / 10).astype(np.float32)
    logits[:, rng.integers(0, vocab, vocab // 8)] = -np.inf
    logits[:, rng.integers(0, vocab)] = 0.0
    best, tokens = drawn(logits, seed, temperature, top_p, min_p, top_k)
    assert np.array_equal(best, logits.max(1))
    for row, token in zip(logits, tokens, strict=True):
        loose = min(1.0, top_p * (1 + 1e-4) + 1e-6), min_p * (1 - 1e-4)
        assert kept(row, temperature, *loose, top_k)[token] > 0


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.4},
        {"top_k": 7},
        {"top_k": 70},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_p": 0.8, "top_k": 60, "min_p": 0.02},
    ],
)
def test_draws_are_as_frequent_as_their_weights(rules):
    """Many rows of the same logits, over 40 blocks; Pearson's statistic."""
    rows, vocab = 6000, 20011
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32) * 2.2
    logits[[4, 700, 19000, 20010]] += (6, 7, 6.5, 5)
    every = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | rules
    _, tokens = drawn(np.tile(logits, (rows, 1)), 1, **every)
    weights = kept(logits, **every)
    want = rows * weights / weights.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[want == 0].sum() == 0
    often = want >= 8
    expected, got = np.append(want[often], want[~often].sum()), np.append(counts[often], 0)
    got[-1] = rows - got.sum()
    terms = ((got - expected)[expected > 0]) ** 2 / expected[expected > 0]
    freedom = max(len(terms) - 1, 1)
    assert terms.sum() < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("rows", [1, 6])
def test_draws_of_a_product_are_those_of_its_rows(rows):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows + 2, 640), np.float32)
    weight, scale = matrix(rng, 3001, 640)
    bits = rng.integers(0, 2**32, (rows + 2, 2), np.uint32)
    hot = np.linspace(0, 2, rows + 2, dtype=np.float32)
    rules = cpu.Rules(hot, hot * 0 + 0.9, hot * 0, np.full(rows + 2, 40, np.int32), bits)
    live = jnp.int32(rows)
    made = cpu.int8_draw(x, weight, scale, live, rules)
    wanted = cpu.draw(cpu.int8_matmul(x, weight, scale, live), live, rules)
    for one, other in zip(made, wanted, strict=True):
        assert np.array_equal(one, other)
    assert np.asarray(made[1])[:rows].all()
    again = cpu.int8_draw(x[:1], weight, scale, live, cpu.Rules(*(rule[:1] for rule in rules)))
    assert again[1][0] == made[1][0]


def test_a_row_draws_the_same_alone_and_rows_behind_the_live_ones_nothing():
    logits = np.random.default_rng(8).standard_normal((5, 3000)).astype(np.float32)
    together = drawn(logits, 4, top_p=0.7)[1]
    assert len(set(together.tolist())) > 1
    best, tokens = drawn(logits, 4, top_p=0.7, live=2)
    assert tokens.tolist() == [*together[:2], 0, 0, 0]
    assert best[2:].tolist() == [0, 0, 0]


def test_the_first_of_the_highest_and_what_is_not_a_number():
    logits = np.zeros((4, 1500), np.float32)
    logits[0, [600, 1400]] = 2
    logits[1, 1499], logits[2] = np.nan, -np.inf
    best, tokens = drawn(logits, 0, temperature=0.0)
    assert tokens[[0, 3]].tolist() == [600, 0]
    assert np.isnan(best[1])
    assert np.isneginf(best[2])
