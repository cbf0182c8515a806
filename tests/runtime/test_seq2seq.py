"""An encoder-decoder from a Hugging Face folder, served: everybody's tokens are the numpy oracle's.

Greedy, in float32, whoever else is there, and wherever what was computed has been meanwhile.
"""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import DoneEvent, Finish, Request, Sampling, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.errors import InvalidRequest
from fastserve_jax.models.config import Seq2SeqConfig
from fastserve_jax.models.decoder import fill, parameters
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.seq2seq import abstract
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.memory import accelerator_memory, plan_memory
from fastserve_jax.runtime.step import Steps, StepShape, programs
from fastserve_jax.weights.load import open_folder
from tests.models.t5 import Oracle, write_folder
from tests.runtime.build import runner_of

BOUNDS = {"max_slots": 4, "step_tokens": 32, "max_context": 64, "page_size": 4, "num_pages": 26}
SHAPE = StepShape(**BOUNDS, host_pages=80, encodes=True)
END = frozenset({1})


def runner_from(folder, kind):
    config, tensors = write_folder(folder, kind)
    files = open_folder(folder, kind)
    graph, empty = abstract(files.config, Precision(jnp.float32))
    shapes = {name: leaf.shape for name, leaf in parameters(empty).items()}
    arrays = {name: jnp.asarray(array) for name, array in files.tensors(shapes)}
    runner = runner_of(graph, files.config, SHAPE, fill(empty, arrays), jnp.float32)
    return runner, Oracle(config, tensors)


@pytest.fixture(scope="module", params=["resaved", "t5"])
def served(request, tmp_path_factory):
    """-> runner, oracle."""
    runner, oracle = runner_from(tmp_path_factory.mktemp("model") / "it", request.param)
    with runner:
        yield runner, oracle


def engine_of(runner, policy="fcfs", host_pages=0, overlap=True):
    limits = Limits(**BOUNDS, host_pages=host_pages, encodes=True)
    cost = CostModel([0.002], page_out_s=1e-6, page_in_s=1e-6)
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost)
    return scheduler, Engine(scheduler, runner, overlap=overlap)


def asks(count=14):
    """Sources and how many tokens are wanted. Some begin alike, which must not be shared; two are
    the same, and their pages full, which may be."""
    rng = np.random.default_rng(5)
    common = rng.integers(2, 64, 12).tolist()
    made = []
    for i in range(count):
        own = rng.integers(2, 64, rng.integers(1, 17)).tolist()
        made.append((common + own if i % 2 else own, int(rng.integers(4, 24))))
    made.append((rng.integers(2, 64, 28).tolist(), 20))  # the longest that there is room for
    return [*made, (made[-1][0], 12)]


async def told(engine, source, count, **rules):
    got = []
    rules = Sampling(max_tokens=count, temperature=0.0, stop_ids=END, **rules)
    async with engine.stream(Request(engine.new_id(), (*source, 0), rules)) as events:
        async for event in events:
            if isinstance(event, TokenEvent):
                got.append((event.token, event.logprob))
            if isinstance(event, DoneEvent):
                assert event.reason in (Finish.STOP, Finish.LENGTH)
    return got


@pytest.fixture(scope="module")
def expected(served):
    return [served[1].greedy(source, count)[0] for source, count in asks()]


async def test_log_probabilities_are_the_oracle_s(served):
    runner, oracle = served
    _, engine = engine_of(runner)
    async with engine:
        for source, count in asks()[:5]:
            got = await told(engine, source, count, logprobs=1)
            tokens, logprobs = oracle.greedy(source, count)
            assert [token for token, _ in got] == tokens
            np.testing.assert_allclose([logprob for _, logprob in got], logprobs, atol=2e-4)


@pytest.mark.parametrize(
    ("policy", "host_pages", "overlap"),
    [("fcfs", 0, True), ("mlfq", 80, True), ("mlfq", 6, False), ("adaptive", 80, False)],
)
async def test_together_equals_the_oracle(served, expected, policy, host_pages, overlap):
    runner, _ = served
    scheduler, engine = engine_of(runner, policy, host_pages, overlap)
    with CompileCounter() as counter:
        async with engine:
            got = await asyncio.gather(*(told(engine, *ask) for ask in asks()))
            await engine.drain()
            stats = engine.stats()
    assert counter.compiles == 0
    assert stats.preemptions > 0, "the pool was meant to be too small"
    assert (stats.pages_in > 0) == (host_pages > 0)
    assert [[token for token, _ in row] for row in got] == expected
    scheduler.check()
    assert (stats.running, stats.waiting, stats.ending, stats.pages_used) == (0, 0, 0, 0)


async def test_repetition_counts_from_the_target_s_beginning_on(served):
    runner, oracle = served
    _, engine = engine_of(runner)
    async with engine:
        for source, _ in asks()[:5]:
            found = await told(engine, source, 1, repetition_penalty=50.0)
            last = oracle.logits(source, [0])[-1]
            last[0] = last[0] / 50 if last[0] > 0 else last[0] * 50
            assert found[0][0] == last.argmax()


async def test_what_an_encoder_cannot_do_is_refused(served):
    _, engine = engine_of(served[0])
    async with engine:
        with pytest.raises(InvalidRequest, match="29 tokens, and an encoder reads at most 28"):
            await told(engine, [5] * 29, 4)
        with pytest.raises(InvalidRequest, match="no log-probabilities"):
            await told(engine, [5] * 3, 4, prompt_logprobs=1)
        with pytest.raises(InvalidRequest, match="empty"):
            await told(engine, [], 4)


def test_what_a_folder_of_transformers_5_says(tmp_path):
    _, tensors = write_folder(tmp_path, "resaved")
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.2}')
    files = open_folder(tmp_path, "it")
    assert files.sampling == {"temperature": 0.0, "repetition_penalty": 1.2}
    assert (files.config.tied_head, files.config.scaled_head) == (False, False)
    # One that it drew itself has no head of its own.
    save_file(
        {name: array for name, array in tensors.items() if name != "lm_head.weight"},
        tmp_path / "model.safetensors",
    )
    config = open_folder(tmp_path, "it").config
    assert (config.tied_head, config.scaled_head) == (True, False)


def test_the_memory_of_a_step_is_planned():
    """Of one whose sources are so long that nearly all of it is scores."""
    config = Seq2SeqConfig("t5", 64, 32, 1, 16, 16, 8, 48, 2048, 1e-6)
    bounds = BOUNDS | {"step_tokens": 512}
    graph, empty = abstract(config, Precision(jnp.float32))
    steps = Steps(graph, config, StepShape(**bounds, encodes=True))
    (forward,) = (p for p in programs(steps, empty, jnp.float32) if p.name == "forward[512]")
    needed = forward.lower().compile().memory_analysis().temp_size_in_bytes
    plan = plan_memory(config, jnp.float32, 0, **bounds, free=accelerator_memory(1 << 34))
    assert 0.5 < needed / plan.work_bytes < 1.0
