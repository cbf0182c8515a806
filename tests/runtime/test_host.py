"""Pages that went to host memory and came back, by hand-written plans: the same tokens, the same
bits, and nothing else touched."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.core.types import Admission, Plan, Sampling, StepResult, Work
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.host import (
    SIZES,
    HostLayout,
    Moves,
    Swaps,
    empty_host_pages,
    swap_programs,
)
from fastserve_jax.runtime.step import StepShape
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner

SHAPE = StepShape(
    max_slots=4, step_tokens=16, max_context=160, page_size=4, num_pages=96, host_pages=80
)
# A head of its own: a tied one with random weights repeats its last token for ever.
CONFIG = replace(FAMILIES["llama"], tied_head=False)
GREEDY = Sampling(max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def runner():
    runner, _ = build_runner(CONFIG, SHAPE)
    with runner:
        yield runner


class Hand:
    """Writes plans for one sequence and keeps its tokens."""

    def __init__(self, runner, slot, pages, seed):
        self.runner, self.slot, self.pages = runner, slot, list(pages)
        self.tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, 21).tolist()
        self.known = 0

    def _run(self, count, samples, admissions=(), **swaps):
        end = self.known + count
        pages = tuple(self.pages[: -(-end // SHAPE.page_size)])
        work = Work(self.slot, self.slot, self.known, count, 0, pages, samples)
        result = self.runner.run(Plan(0, admissions, (work,), **swaps))
        self.known = end
        if samples:
            self.tokens.append(result.sampled[self.slot].token)

    def admit(self, **swaps):
        """The slot learns its tokens; what is in its pages stays as it is."""
        admission = Admission(self.slot, self.slot, tuple(self.tokens), 21, GREEDY)
        if self.known:
            self.runner.run(Plan(0, (admission,), (), **swaps))
            return
        self._run(16, samples=False, admissions=(admission,), **swaps)
        self._run(5, samples=True)

    def decode(self, count, **swaps):
        for _ in range(count):
            self._run(1, samples=True, **swaps)
            swaps = {}
        return self.tokens


@pytest.fixture(scope="module")
def undisturbed(runner):
    hand = Hand(runner, 0, range(40), seed=1)
    hand.admit()
    return list(hand.decode(100))


def device_bits(runner, pages):
    return [np.asarray(layer)[list(pages)] for layer in runner._kv_pages]


def host_bits(runner):
    return np.array(runner._host._host_pages)


def spoil(runner, pages):
    """Another sequence writes all of `pages`."""
    hand = Hand(runner, 3, pages, seed=9)
    hand.admit()
    hand.decode(4 * len(pages) - 22)


def test_the_text_goes_on_from_other_pages_of_another_slot(runner, undisturbed):
    hand = Hand(runner, 0, range(40), seed=1)
    hand.admit()
    hand.decode(60)
    count = -(-hand.known // SHAPE.page_size)
    assert count > SIZES[-1], "one call was not meant to be enough"
    out = tuple((page, 70 - page) for page in range(count))
    runner.run(Plan(0, (), (), swap_out=out))
    spoil(runner, range(count))
    hand.slot, hand.pages = 2, [90 - i for i in range(40)]
    hand.admit(swap_in=tuple((70 - page, hand.pages[page]) for page in range(count)))
    assert hand.decode(40) == undisturbed


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 17, 33, 48])
def test_what_comes_back_is_what_went_and_nothing_else_is_touched(runner, count):
    spoil(runner, range(0, 40))
    spoil(runner, range(40, 80))
    rng = np.random.default_rng(count)
    device, host = rng.permutation(96)[: 2 * count], rng.permutation(80)[:count]
    source, target = device[:count], device[count:]
    before, host_before = device_bits(runner, range(96)), host_bits(runner)
    runner.run(Plan(0, (), (), swap_out=tuple(zip(source.tolist(), host.tolist(), strict=True))))
    host_after = host_bits(runner)
    runner.run(Plan(0, (), (), swap_in=tuple(zip(host.tolist(), target.tolist(), strict=True))))
    spared = np.setdiff1d(np.arange(80), host)
    assert np.array_equal(host_after[spared], host_before[spared])
    assert np.array_equal(host_bits(runner), host_after)
    for was, now in zip(before, device_bits(runner, range(96)), strict=True):
        want = was.copy()
        want[target] = was[source]
        assert np.array_equal(now, want)


def test_a_page_that_goes_out_may_be_written_by_the_same_plan(runner, undisturbed):
    """Two sequences change places in one plan, and one of them runs in it."""
    first, second = Hand(runner, 0, range(40), seed=1), Hand(runner, 1, range(40, 80), seed=2)
    first.admit()
    first.decode(30)
    count = -(-first.known // SHAPE.page_size)
    runner.run(Plan(0, (), (), swap_out=tuple((page, page) for page in range(count))))
    second.pages = first.pages  # writes over them
    second.admit()
    second.decode(30)
    first.decode(
        1,
        swap_out=tuple((page, 40 + page) for page in range(count)),
        swap_in=tuple((page, page) for page in range(count)),
    )
    assert first.decode(69) == undisturbed
    second.pages = list(range(40, 80))
    got = second.decode(20, swap_in=tuple((40 + page, 40 + page) for page in range(count)))
    alone = Hand(runner, 2, range(40, 80), seed=2)
    alone.admit()
    assert got == alone.decode(50)


async def test_plans_that_nobody_waits_for_keep_their_order(runner, undisturbed):
    """Out, overwritten, in elsewhere, out again over the same host page, in: all in flight."""
    hand = Hand(runner, 0, range(40), seed=1)
    hand.admit()
    hand.decode(60)
    count = -(-hand.known // SHAPE.page_size)
    other = Hand(runner, 1, range(40, 80), seed=2)
    other.admit()
    other.decode(60)
    here, there = range(count), range(40, 40 + count)
    chunk = tuple(range(80, 84))
    futures = []

    def go(work=(), admissions=(), **swaps):
        swaps = {name: tuple(zip(*pages, strict=True)) for name, pages in swaps.items()}
        futures.append(runner.dispatch(Plan(0, admissions, work, **swaps)))

    for _ in range(20):
        go(swap_out=(here, here))
        go(swap_in=(there, here), swap_out=(there, there))  # the other's pages, over the first's
        go(
            admissions=(Admission(3, 3, tuple(range(16)), 16, GREEDY),),
            work=(Work(3, 3, 0, 16, 0, chunk, samples=True),),
        )
        go(swap_in=(here, there))
        go(swap_out=(there, here), swap_in=(there, there))
        go(swap_in=(here, here))
    results = [await future for future in futures]
    assert results[0] == StepResult({}, {})
    assert len({result.sampled[3].token for result in results[2::6]}) == 1
    assert hand.decode(40) == undisturbed


def test_nothing_compiles_after_the_start(runner):
    with CompileCounter() as counter:
        for count in (1, 4, 5, 40):
            copies = tuple((page, page) for page in range(count))
            runner.run(Plan(0, (), (), swap_out=copies))
            runner.run(Plan(0, (), (), swap_in=copies))
    assert counter.compiles == 0


def test_pages_stay_where_they_are(runner):
    """In place: no call may copy a pool."""
    copies = tuple((page, page) for page in range(3))
    runner.run(Plan(0, (), (), swap_out=copies, swap_in=copies))
    before = [runner._host._host_pages, *runner._kv_pages]
    addresses = [pool.unsafe_buffer_pointer() for pool in before]
    runner.run(Plan(0, (), (), swap_out=copies, swap_in=copies))
    after = [runner._host._host_pages, *runner._kv_pages]
    assert [pool.unsafe_buffer_pointer() for pool in after] == addresses
    assert all(pool.is_deleted() for pool in before)
    assert runner._host._host_pages.sharding.memory_kind == "pinned_host"


def test_the_caller_does_not_wait(runner):
    """XLA:CPU runs what it finds to be less than a thousand operations on the caller's thread."""
    swaps = [name for name in runner._programs if name.startswith("swap")]
    assert {name.partition("[")[0] for name in swaps} == {"swap_out", "swap_in"}
    for name in swaps:
        assert runner._programs[name].cost_analysis()["flops"] > 1000


def test_without_a_host_tier_there_are_no_programs_and_no_swaps():
    runner, _ = build_runner(CONFIG, replace(SHAPE, host_pages=0))
    with runner:
        assert not [name for name in runner._programs if name.startswith("swap")]
        with pytest.raises(AssertionError, match="host tier"):
            runner.run(Plan(0, (), (), swap_out=((0, 0),)))


def test_a_plan_of_nothing_is_done(runner):
    assert runner.run(Plan(0, (), ())) == StepResult({}, {})


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_form_for_accelerators_copies_the_same(count):
    """What a CPU does not run by itself, run on one: whole calls, then a scatter."""
    rng = np.random.default_rng(0)
    kv_pages = [rng.random((12, 2, 4, 16), np.float32) for _ in range(3)]
    host = rng.random((9, 3 * 128 // 128, 128), np.float32)
    sources, targets = rng.permutation(12)[:4], rng.permutation(9)[:4]
    sources[count:], targets[count:] = sources[count - 1], targets[count - 1]
    out, back = (Moves(*pair, np.int32(count)) for pair in [(sources, targets), (targets, sources)])
    there = host_space(host)
    for on_cpu in (False, True):
        swaps = Swaps(on_cpu)
        stored, _ = jax.jit(swaps.swap_out)(there, kv_pages, out)
        want = host.copy()
        for source, target in zip(sources[:count], targets[:count], strict=True):
            want[target] = np.stack([pages[source] for pages in kv_pages]).reshape(-1, 128)
        assert np.array_equal(stored, want)
        empty = [np.zeros_like(pages) for pages in kv_pages]
        restored, _ = jax.jit(swaps.swap_in)(empty, stored, back)
        for layer, pages in enumerate(restored):
            kept = np.zeros_like(kv_pages[layer])
            kept[sources[:count]] = kv_pages[layer][sources[:count]]
            assert np.array_equal(pages, kept)


def host_space(array):
    return jax.device_put(array, jax.memory.Space.Host)


@pytest.mark.parametrize("page_shape", [(1, 16, 512), (1, 4, 16), (2, 16, 128), (3, 4, 16)])
def test_copies_take_no_room_beside_the_pools_however_a_page_is_shaped(page_shape):
    """XLA keeps some arrays in place and copies others, by their dimensions."""
    kv_pages = [jnp.zeros((96, *page_shape), jnp.bfloat16)] * 3
    layout = HostLayout(96, len(kv_pages), math.prod(page_shape))
    device = jax.devices()[0]
    made = {p.name: p.lower().compile() for p in swap_programs(layout, kv_pages, device)}
    page_bytes = 2 * layout.num_layers * layout.page_elements
    assert made.keys() == {"swap_in[16]", "swap_out[16]", "swap_out[4]"}
    for program in made.values():
        assert program.memory_analysis().temp_size_in_bytes < 17 * page_bytes + 32768
    bits = np.random.default_rng(1).integers(0, 2**15, layout.shape, np.uint16)
    pool = jax.device_put(
        bits.view(jnp.bfloat16), empty_host_pages(layout, jnp.bfloat16, None).sharding
    )
    moves = Moves(np.arange(16, dtype=np.int32), 90 - np.arange(16, dtype=np.int32), np.int32(9))
    got, _ = made["swap_in[16]"]([pages.copy() for pages in kv_pages], pool, moves)
    for layer, pages in enumerate(got):
        want = np.zeros((96, layout.page_elements), np.uint16)
        for source in range(9):
            want[90 - source] = bits[source].reshape(3, -1)[layer]
        assert np.array_equal(np.asarray(pages).view(np.uint16).reshape(96, -1), want)
