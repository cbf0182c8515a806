"""Paged attention against the plain reference and a float64 oracle, with garbage in spare pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import cases, reference


def build(case, dtype, seed=0):
    """Random rows in shuffled pages; every place no row owns holds NaN."""
    rng = np.random.default_rng(seed)
    layout = case.layout()
    order = rng.permutation(layout.num_pages)
    kv = np.full(layout.shape, np.nan, np.float32)
    width = max(-(-total // case.page_size) for _, total in case.rows) + 2
    rows = len(case.rows) + 2  # two rows nobody uses
    table = np.full((rows, width), layout.num_pages - 1, np.int32)
    kv_lens, cu_q_lens, at = np.zeros(rows, np.int32), np.zeros(rows + 1, np.int32), 0
    for row, (new, total) in enumerate(case.rows):
        count = -(-total // case.page_size)
        table[row, :count] = order[at : at + count]
        at += count
        for position in range(total):
            page, offset = divmod(position, case.page_size)
            kv[table[row, page], :, offset] = rng.standard_normal(layout.shape[1::2])
        kv_lens[row], cu_q_lens[row + 1] = total, cu_q_lens[row] + new
    cu_q_lens[len(case.rows) + 1 :] = cu_q_lens[len(case.rows)]
    tokens = 1 << int(cu_q_lens[-1] - 1).bit_length()
    q = rng.standard_normal((tokens, case.num_heads, case.head_dim))
    ones = sum(new == 1 for new, _ in case.rows)
    arrays = (kv_lens, table, cu_q_lens, np.array([ones, len(case.rows)], np.int32))
    return jnp.asarray(q, dtype), jnp.asarray(kv, dtype), *map(jnp.asarray, arrays)


def oracle(q, kv, kv_lens, table, cu_q_lens, distribution, scale, window):
    """Token by token in float64."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    out, page_size = np.zeros(q.shape), kv.shape[2]
    for row in range(int(distribution[1])):
        new, total = int(cu_q_lens[row + 1] - cu_q_lens[row]), int(kv_lens[row])
        places = [divmod(position, page_size) for position in range(total)]
        whole = np.stack([kv[table[row, page], :, offset] for page, offset in places])
        for i in range(new):
            at, token = total - new + i, int(cu_q_lens[row]) + i
            past = whole[max(0, at - window + 1) if window else 0 : at + 1]
            for head in range(q.shape[1]):
                keys, values = np.split(past[:, head * kv.shape[1] // q.shape[1]], 2, axis=1)
                scores = keys @ q[token, head] * scale
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values / weights.sum()
    return out


BFLOAT16 = [case for case in cases.ATTENTION if case.name.startswith(("smollm2", "stories"))]
RUNS = [(case, jnp.float32) for case in cases.ATTENTION] + [(c, jnp.bfloat16) for c in BFLOAT16]


@pytest.mark.parametrize(
    ("case", "dtype"),
    RUNS,
    ids=lambda x: x.name if isinstance(x, cases.AttentionCase) else x.__name__,
)
def test_xla_equals_reference(case, dtype):
    arrays = build(case, dtype)
    used = int(arrays[4][-1])
    options = {"scale": case.head_dim**-0.5, "window": case.window}
    got = jax.jit(lambda *a: pallas_kernels.ragged_paged_attention(*a, **options))(*arrays)
    want = reference.ragged_paged_attention(*arrays, **options)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        np.asarray(got[:used], np.float32),
        np.asarray(want[:used], np.float32),
        atol=tolerance * 4,
        rtol=tolerance,
    )


@pytest.mark.parametrize("name", ["smollm2_mixed", "gemma3_local_narrow", "stories_mixed"])
def test_reference_equals_float64(name):
    case = next(case for case in cases.ATTENTION if case.name == name)
    arrays = build(case, jnp.float32, seed=3)
    used = int(arrays[4][-1])
    scale = case.head_dim**-0.5
    got = reference.ragged_paged_attention(*arrays, scale=scale, window=case.window)
    want = oracle(*arrays, scale, case.window)
    np.testing.assert_allclose(np.asarray(got[:used]), want[:used], atol=3e-6, rtol=2e-5)


def test_a_row_does_not_feel_its_neighbours():
    """Bit for bit: a decode row alone, and the same row in a mixed batch."""
    case = next(case for case in cases.ATTENTION if case.name == "smollm2_mixed")
    q, kv, kv_lens, table, cu_q_lens, distribution = build(case, jnp.bfloat16)
    attend = jax.jit(lambda *a: pallas_kernels.ragged_paged_attention(*a, scale=0.125))
    mixed = attend(q, kv, kv_lens, table, cu_q_lens, distribution)
    row = 2
    alone = attend(
        jnp.roll(q, -row, axis=0)[:4],
        kv,
        jnp.roll(kv_lens, -row),
        jnp.roll(table, -row, axis=0),
        jnp.minimum(jnp.arange(len(kv_lens) + 1), 1),
        jnp.array([1, 1]),
    )
    np.testing.assert_array_equal(np.asarray(mixed[row]), np.asarray(alone[0]))


def test_write_kv_fills_places_and_drops_padding():
    layout = pallas_kernels.KVLayout(num_pages=4, num_kv_heads=2, page_size=8, head_dim=4)
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 3, 2, 4)).astype(np.float32)
    pages, offsets = np.array([2, 0, layout.num_pages]), np.array([7, 3, 1])
    got = np.asarray(pallas_kernels.write_kv(jnp.zeros(layout.shape), keys, values, pages, offsets))
    want = np.zeros(layout.shape, np.float32)
    want[2, :, 7, :4], want[2, :, 7, 4:] = keys[0], values[0]
    want[0, :, 3, :4], want[0, :, 3, 4:] = keys[1], values[1]
    np.testing.assert_array_equal(got, want)
