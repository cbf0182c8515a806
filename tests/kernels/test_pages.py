"""Pages copied whole, and new rows into pages: the TPU's kernels and XLA, without races."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cases, gather_pages, reference, scatter_pages, tpu, write_kv
from pallas_kernels.tpu import pages as tpu_pages
from pallas_kernels.tpu import write as tpu_write

INTERPRET = pltpu.InterpretParams(detect_races=True)
named = pytest.mark.parametrize("case", cases.PAGES, ids=lambda case: case.name)


def pages(case, lanes=128):
    random = np.random.default_rng(0)
    shape = case.layout(lanes).shape
    layers = [
        jnp.asarray(random.integers(-99, 99, shape), case.dtype) for _ in range(case.num_layers)
    ]
    chosen = random.permutation(case.num_pages)[: case.size].astype(np.int32)
    chosen[-2:] = chosen[-3]  # filled up with the last
    return layers, jnp.asarray(chosen)


@named
def test_pages_there_and_back(case):
    layers, sources = pages(case)
    want = reference.gather_pages(layers, sources)
    for got in (gather_pages(layers, sources), tpu.gather_pages(layers, sources, INTERPRET)):
        np.testing.assert_array_equal(np.asarray(got), want)
    real = case.size - 2
    targets = jnp.flip(jnp.arange(case.size) + 2).astype(jnp.int32)
    filled = targets.at[real:].set(targets[real - 1])
    staged = jnp.asarray(want).at[real:].set(want[real - 1])
    expected = reference.scatter_pages(layers, staged, filled, real)
    for got in (
        scatter_pages(layers, staged, filled, jnp.int32(real)),
        tpu.scatter_pages(layers, staged, filled, jnp.int32(real), INTERPRET),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# Of rows with so many new tokens, the first of them at this place of a page of 32
ROWS = ((1, 5), (1, 31), (1, 0), (33, 3), (52, 23), (7, 16), (1, 12))


def places(num_pages, page_size):
    """Where the tokens of ROWS go, each row's pages being its own; and some that go nowhere."""
    random = np.random.default_rng(0)
    own = iter(random.permutation(num_pages))
    pages, offsets = [], []
    for tokens, start in ROWS:
        start %= page_size
        row = [next(own) for _ in range(-(-(start + tokens) // page_size))]
        for at in range(start, start + tokens):
            pages.append(row[at // page_size])
            offsets.append(at % page_size)
    pages, offsets = [*pages, *[num_pages] * 4], [*offsets, 0, 1, 2, 0]
    return jnp.asarray(pages, jnp.int32), jnp.asarray(offsets, jnp.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_go_to_their_places_and_nowhere_else(dtype, heads):
    random = np.random.default_rng(1)
    stored = jnp.asarray(random.integers(-99, 99, (24, heads, 32, 128)), dtype)
    pages, offsets = places(24, 32)
    rows = jnp.asarray(random.integers(-99, 99, (len(pages), heads, 128)), dtype)
    want = stored.at[pages, :, offsets].set(rows, mode="drop")
    got = tpu.write_rows(stored, rows, pages, offsets, INTERPRET)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    by_xla = write_kv(stored, rows[..., :64], rows[..., 64:], pages, offsets)
    np.testing.assert_array_equal(np.asarray(by_xla), np.asarray(want))


def test_what_a_call_does_not_take_at_once_it_takes_in_turn(monkeypatch):
    random = np.random.default_rng(1)
    stored = jnp.asarray(random.integers(-99, 99, (24, 1, 32, 128)), "float32")
    pages, offsets = places(24, 32)
    rows = jnp.asarray(random.integers(-99, 99, (len(pages), 1, 128)), "float32")
    monkeypatch.setattr(tpu_write, "_MOST_TOKENS", 24)
    got = tpu.write_rows(stored, rows, pages, offsets, INTERPRET)
    want = stored.at[pages, :, offsets].set(rows, mode="drop")
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_each_tile_that_changes_is_read_and_written_once():
    pages, offsets = places(24, 32)
    found = tpu_write.stretches(pages, offsets, 24, tile=16)
    tiles = {(int(p), int(o) // 16) for p, o in zip(pages, offsets, strict=True) if p < 24}
    assert int(found.real[0]) == len(tiles)
    real = [np.asarray(array[: len(tiles)]) for array in found[1:]]
    assert {(p, o // 16) for _, _, p, o in zip(*real, strict=True)} == tiles
    assert sum(real[1]) == sum(tokens for tokens, _ in ROWS)


# Wrong kernels, to see the checks fail


def test_a_copy_that_is_not_waited_for_is_seen(monkeypatch):
    case = cases.PAGES[-1]
    layers, sources = pages(case)
    layers = [layer.astype(jnp.float32) for layer in layers]  # what is not written is NaN
    start = tpu_pages.pltpu.make_async_copy

    def forgetful(*refs):
        return SimpleNamespace(start=start(*refs).start, wait=lambda: None)

    monkeypatch.setattr(tpu_pages.pltpu, "make_async_copy", forgetful)
    got = np.asarray(tpu.gather_pages(layers, sources, INTERPRET))
    pltpu.reset_tpu_interpret_mode_state()
    assert not np.array_equal(got, reference.gather_pages(layers, sources))


def test_a_tile_that_is_not_read_before_it_is_written_is_seen(monkeypatch):
    stored = jnp.ones((24, 1, 32, 128), jnp.float32)
    pages, offsets = places(24, 32)
    rows = jnp.zeros((len(pages), 1, 128), jnp.float32)
    copy = tpu_write._Kernel.copy

    def only_back(self, head, at, slot, place, back):
        nothing = SimpleNamespace(start=lambda: None, wait=lambda: None)
        return copy(self, head, at, slot, place, back) if back else nothing

    monkeypatch.setattr(tpu_write._Kernel, "copy", only_back)
    got = tpu.write_rows(stored, rows, pages, offsets, INTERPRET)
    want = stored.at[pages, :, offsets].set(rows, mode="drop")
    assert not np.array_equal(np.asarray(jax.block_until_ready(got)), np.asarray(want))
