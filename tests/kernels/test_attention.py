"""Paged attention against the plain reference and a float64 oracle, with garbage in spare pages."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Target, cases, compiling_for, dispatch, reference
from tests.kernels.rows import build, options, oracle

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
    given = options(case)
    attend = partial(pallas_kernels.ragged_paged_attention, **given, with_lse=True)
    got = jax.jit(attend)(*arrays)
    want = reference.ragged_paged_attention(*arrays, **given, with_lse=True)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours[:used], np.float32),
            np.asarray(theirs[:used], np.float32),
            atol=tolerance * 4,
            rtol=tolerance,
        )
    alone = jax.jit(partial(pallas_kernels.ragged_paged_attention, **given))(*arrays)
    np.testing.assert_array_equal(np.asarray(alone[:used]), np.asarray(got[0][:used]))


ORACLE = ("smollm2_mixed", "gemma3_local_narrow", "stories_mixed", "gemma2_few", "gpt_oss_few")


@pytest.mark.parametrize("name", [*ORACLE, "llama3_8b_int8"])
def test_reference_equals_float64(name):
    case = next(case for case in cases.ATTENTION if case.name == name)
    arrays = build(case, jnp.float32, seed=3)
    used = int(arrays[4][-1])
    given = options(case)
    got = reference.ragged_paged_attention(*arrays, **given, with_lse=True)
    for ours, theirs in zip(got, oracle(*arrays, **given), strict=True):
        np.testing.assert_allclose(np.asarray(ours[:used]), theirs[:used], atol=3e-6, rtol=2e-5)


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


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_what_is_stored_by_scale_comes_back_by_it(dtype):
    layout = pallas_kernels.KVLayout(4, num_kv_heads=2, page_size=8, head_dim=4, lanes=16)
    assert layout.shape == (4, 2, 8, 16)
    rng = np.random.default_rng(0)
    keys, values = 3 * rng.standard_normal((2, 5, 2, 4)).astype(np.float32)
    scales = np.array([[0.1, 0.2], [0.15, 0.1]], np.float32)
    pages, offsets = np.full(5, 2), np.arange(5)
    empty = jnp.zeros(layout.shape, dtype)
    stored = pallas_kernels.write_kv(empty, keys, values, pages, offsets, scales)
    assert stored.dtype == dtype
    rows = np.asarray(stored, np.float32)[2, :, :5].transpose(1, 0, 2)
    for got, want, scale in ((rows[..., :4], keys, scales[0]), (rows[..., 4:8], values, scales[1])):
        step = scale[:, None] * (0.5 if dtype == jnp.int8 else 0.0) + abs(want) * 2.0**-4
        assert (abs(got * scale[:, None] - want) <= step).all()
    assert not rows[..., 8:].any()
    far = pallas_kernels.write_kv(empty, keys * 1e6, values, pages, offsets, scales)
    if dtype == jnp.int8:
        assert abs(np.asarray(far, np.int32)).max() == 127


# platform, capability, query and page types, tokens of a page -> what attends
CHOICES = [
    ("cpu", "", jnp.bfloat16, jnp.bfloat16, 16, "xla"),
    ("tpu", "", jnp.bfloat16, jnp.bfloat16, 16, "tpu"),
    ("tpu", "", jnp.bfloat16, jnp.bfloat16, 8, "xla"),
    ("tpu", "", jnp.float32, jnp.float32, 8, "tpu"),
    ("tpu", "", jnp.bfloat16, jnp.int8, 16, "xla"),
    ("tpu", "", jnp.bfloat16, jnp.int8, 32, "tpu"),
    ("gpu", "9.0", jnp.bfloat16, jnp.bfloat16, 16, "gpu"),
    ("gpu", "8.0", jnp.bfloat16, jnp.int8, 16, "gpu"),
    ("gpu", "8.0", jnp.bfloat16, jnp.float8_e4m3fn, 16, "xla"),
    ("gpu", "10.0", jnp.bfloat16, jnp.float8_e4m3fn, 16, "gpu"),
    ("gpu", "9.0", jnp.float32, jnp.float32, 16, "xla"),
    ("gpu", "9.0", jnp.bfloat16, jnp.bfloat16, 24, "xla"),
]


@pytest.mark.parametrize(("platform", "capability", "q", "pages", "page_size", "want"), CHOICES)
def test_each_platform_attends_by_its_own(
    monkeypatch, platform, capability, q, pages, page_size, want
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    device = SimpleNamespace(compute_capability=capability, device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    queries = jax.ShapeDtypeStruct((4, 2, 64), q)
    stored = jax.ShapeDtypeStruct((9, 1, page_size, 128), pages)
    assert dispatch.implementation(queries, stored) == want
    assert pallas_kernels.target().lanes == (128 if platform == "tpu" else 1)
    monkeypatch.undo()
    if platform != "cpu":  # the same, of a chip that is not here
        chip = Target(platform, has_tma=platform == "gpu" and float(capability) >= 9)
        with compiling_for(chip):
            assert dispatch.implementation(queries, stored) == want
            assert not pallas_kernels.cpu.runs()
        assert dispatch.implementation(queries, stored) == "xla"
