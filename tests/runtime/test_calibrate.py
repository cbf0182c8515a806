"""The cost model that is measured: against a runner whose costs are known, and on a real one."""

from dataclasses import replace

import pytest

from fastserve_jax.core.cost import QUERY_BLOCK, CostModel, StepLoad
from fastserve_jax.core.types import Plan, StepResult
from fastserve_jax.runtime.calibrate import calibrate
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.step import StepShape
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner

SHAPE = StepShape(
    max_slots=32, step_tokens=128, max_context=4096, page_size=16, num_pages=2048, host_pages=64
)
TRUTH = CostModel(
    base_s=[0.010, 0.012, 0.016, 0.022, 0.034],
    buckets=SHAPE.token_buckets,
    prefill_token_s=1e-5,
    decode_row_s=2e-4,
    kv_token_s=3e-6,
    page_out_s=1e-4,
    page_in_s=7e-5,
)


class KnownRunner:
    """Takes what `costs` say, on a clock of its own, and something for every dispatch."""

    page_bytes = 5

    def __init__(self, shape, costs, platform="cpu", first_s=0.0):
        self.shape, self.platform, self._costs = shape, platform, costs
        self._first_s, self._met = first_s, set()
        self.now = 0.0
        self.plans: list[Plan] = []

    def clock(self):
        return self.now

    def run(self, plan):
        self.plans.append(plan)
        if not plan.work:
            self.now += 3e-4 + self._costs.move_s(len(plan.swap_out), len(plan.swap_in))
            return StepResult({})
        self.now += self._costs.compute_s(plan.load)
        bucket = next(b for b in self.shape.token_buckets if b >= plan.load.tokens)
        if bucket not in self._met:
            self._met.add(bucket)
            self.now += self._first_s
        return StepResult({})


def near(value, within=0.02):
    return pytest.approx(value, rel=within)


def test_what_steps_cost_is_found():
    runner = KnownRunner(SHAPE, TRUTH, first_s=0.2)
    found = calibrate(runner, budget_s=2.0, clock=runner.clock)
    assert found.base_s == near(TRUTH.base_s)
    assert found.buckets == SHAPE.token_buckets
    assert found.prefill_token_s == near(TRUTH.prefill_token_s, 0.2)
    assert found.decode_row_s == near(TRUTH.decode_row_s)
    assert found.kv_token_s == near(TRUTH.kv_token_s)
    assert found.page_out_s == near(TRUTH.page_out_s, 0.1)
    assert found.page_in_s == near(TRUTH.page_in_s, 0.1)
    assert found.page_bytes == 5
    assert not found.overlaps
    for plan in runner.plans:
        if plan.work:
            assert found.step_s(plan.load) == near(TRUTH.step_s(plan.load))


def test_an_accelerator_copies_beside_its_steps():
    runner = KnownRunner(SHAPE, TRUTH, platform="tpu")
    found = calibrate(runner, clock=runner.clock)
    assert found.overlaps
    assert found.page_out_s == near(TRUTH.page_out_s, 0.1)


@pytest.mark.parametrize("slowness", [1, 100])
def test_the_budget_is_kept_and_a_slow_model_is_measured_in_four_steps(slowness):
    costs = CostModel(
        [slowness * s for s in TRUTH.base_s], TRUTH.buckets, decode_row_s=slowness * 2e-4
    )
    runner = KnownRunner(SHAPE, costs)
    found = calibrate(runner, budget_s=0.5, clock=runner.clock)
    steps = [plan for plan in runner.plans if plan.work]
    longest_s = max(costs.step_s(plan.load) for plan in steps)
    if slowness == 1:
        assert len(steps) > 10
        assert runner.now < 0.5 + 3 * longest_s
    else:
        assert len(set(map(id, steps))) == 4
        assert len(steps) == 7  # the first with each program is for nothing
    assert found.base_s[0] == near(costs.base_s[0], 0.3)
    assert found.base_s[-1] == near(costs.base_s[-1], 0.5)


SMALL = StepShape(max_slots=3, step_tokens=5, max_context=9, page_size=4, num_pages=3)


@pytest.mark.parametrize("host_pages", [0, 1, 2, 70])
@pytest.mark.parametrize("shape", [SHAPE, SMALL, StepShape(2, 2, 8, 4, 2)], ids=str)
def test_plans_keep_to_the_shape(shape, host_pages):
    shape = replace(shape, host_pages=host_pages)
    runner = KnownRunner(shape, TRUTH)
    found = calibrate(runner, budget_s=2, clock=runner.clock)
    for plan in runner.plans:
        assert len({work.slot for work in plan.work}) == len(plan.work) <= shape.max_slots
        assert sum(work.count for work in plan.work) <= shape.step_tokens
        assert [work.count == 1 for work in plan.work] == sorted(
            [work.count == 1 for work in plan.work], reverse=True
        )
        pages = [page for work in plan.work for page in work.pages]
        assert len(set(pages)) == len(pages) <= shape.num_pages
        assert max(pages, default=0) < shape.num_pages
        ends = [(work.start + work.count, work.count) for work in plan.work]
        read = sum(end if count == 1 else end * -(-count // QUERY_BLOCK) for end, count in ends)
        counts = [count for _, count in ends]
        ones = counts.count(1)
        assert plan.load == StepLoad(sum(counts) - ones, ones, read)
        for work in plan.work:
            assert work.start >= 0
            assert work.start + work.count <= shape.max_context
            assert len(work.pages) * shape.page_size >= work.start + work.count
        for pairs, sources, targets in (
            (plan.swap_out, shape.num_pages, shape.host_pages),
            (plan.swap_in, shape.host_pages, shape.num_pages),
        ):
            assert all(a < sources and b < targets for a, b in pairs)
    assert bool(found.page_out_s) == bool(found.page_in_s) == bool(host_pages)


def test_a_real_runner_is_measured_by_its_own_programs():
    shape = StepShape(4, 16, 64, 4, 48, host_pages=20)
    runner, _ = build_runner(FAMILIES["llama"], shape)
    with runner, CompileCounter() as counter:
        found = calibrate(runner, budget_s=0.2)
    assert counter.compiles == 0
    assert found.buckets == shape.token_buckets
    assert all(base > 0 for base in found.base_s)
    terms = (found.prefill_token_s, found.decode_row_s, found.kv_token_s)
    assert min(*terms, found.page_out_s, found.page_in_s) >= 0
    assert not found.overlaps
    assert found.page_bytes == 2 * 2 * 2 * 4 * 8 * 4  # key and value, layers, heads, ..., float32
