"""Adapters on the device: whoever shares a step, each row is what its own merged model says.

float32 and a head of its own, so equality is token for token, with a numpy model that knows neither
batches nor caches nor adapters.
"""

import asyncio
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.adapters import LoadedAdapters
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.types import (
    Adapter,
    Admission,
    DoneEvent,
    Plan,
    Request,
    Sampling,
    StartEvent,
    TokenEvent,
    Work,
)
from fastserve_jax.engine import Engine
from fastserve_jax.errors import ConfigError, InvalidRequest, ModelNotFound
from fastserve_jax.models.adapters import AdapterRoom
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.runtime.compile import CompileCounter
from fastserve_jax.runtime.step import StepShape
from fastserve_jax.weights.adapter_arrays import read_adapter
from tests.models import oracle
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner
from tests.weights import peft

CONFIG = ModelConfig(
    "llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_context=48,
    norm_eps=1e-5,
    tied_head=False,
)
BOUNDS = {"max_slots": 4, "step_tokens": 16, "max_context": 48, "page_size": 4, "num_pages": 22}
SHAPE = StepShape(**BOUNDS, host_pages=60, adapters=AdapterRoom(2, 4))
BASE, FIRST, SECOND, THIRD = None, Adapter(1, 1), Adapter(2, 2), Adapter(1, 3)


@pytest.fixture(scope="module")
def runner():
    runner, arrays = build_runner(CONFIG, SHAPE)
    with runner:
        yield runner, arrays


@pytest.fixture(scope="module")
def adapted(runner, tmp_path_factory):
    """The runner with two adapters, of another rank each, and the arrays that each row means."""
    device, arrays = runner
    drawn = {a: draw(rank, tmp_path_factory) for a, rank in ((FIRST, 4), (SECOND, 2), (THIRD, 3))}
    meant = {adapter: peft.merged(arrays, added) for adapter, (_, added) in drawn.items()}
    pairs = {adapter: read for adapter, (read, _) in drawn.items()}
    return device, {BASE: arrays, **meant}, pairs


def draw(rank, folders):
    """-> one as the device takes it, and what it adds."""
    tensors, added = peft.draw(CONFIG, rank, rank)
    folder = peft.write(folders.mktemp("adapter"), tensors, rank)
    return read_adapter(folder, CONFIG, SHAPE.adapters.rank, jnp.float32), added


def greedy(arrays, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(oracle.logits(CONFIG, arrays, np.array(tokens))[-1])))
    return tokens[len(prompt) :]


def make_engine(device, pairs, policy="fcfs", host_pages=0):
    limits = Limits(**BOUNDS, host_pages=host_pages)
    cost = CostModel([0.002], page_out_s=1e-6, page_in_s=1e-6)
    scheduler = Scheduler(limits, make_policy(policy, limits, cost), cost)
    engine = Engine(scheduler, device)
    for adapter in (FIRST, SECOND) if pairs else ():
        engine.add_adapter(adapter, pairs[adapter])
    return scheduler, engine


async def ask(engine, prompt, count, adapter):
    """-> tokens, and how many of the prompt were known."""
    rules = Sampling(max_tokens=count, temperature=0.0)
    got, known = [], 0
    request = Request(engine.new_id(), tuple(prompt), rules, adapter=adapter)
    async with engine.stream(request) as events:
        async for event in events:
            if isinstance(event, StartEvent):
                known = event.cached_tokens
            if isinstance(event, TokenEvent):
                got.append(event.token)
            assert not isinstance(event, DoneEvent) or event.output_tokens == count
    return got, known


def requests():
    """Twelve, four of each kind, half of them behind one common beginning."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, 64, 9).tolist()
    for i in range(12):
        prompt = rng.integers(0, 64, 1 + i).tolist()
        yield (common + prompt if i % 2 else prompt), 6 + 5 * i % 17, (BASE, FIRST, SECOND)[i % 3]


@pytest.mark.parametrize(("policy", "host_pages"), [("fcfs", 0), ("mlfq", 60)])
async def test_adapters_and_the_base_in_one_batch_equal_each_merged_model(
    adapted, policy, host_pages
):
    device, meant, pairs = adapted
    scheduler, engine = make_engine(device, pairs, policy, host_pages)
    with CompileCounter() as counter:
        async with engine:
            got = await asyncio.gather(*(ask(engine, *asked) for asked in requests()))
            stats = engine.stats()
            alone = [await ask(engine, *asked) for asked in requests()]
    assert counter.compiles == 0
    assert stats.preemptions > 0, "the pool was meant to be too small"
    assert (stats.pages_in > 0) == (host_pages > 0)
    want = [greedy(meant[adapter], prompt, count) for prompt, count, adapter in requests()]
    assert [tokens for tokens, _ in got] == want
    assert [tokens for tokens, _ in alone] == want
    bare = [greedy(meant[BASE], prompt, count) for prompt, count, _ in requests()]
    assert sum(a != b for a, b in zip(want, bare, strict=True)) > 5, "adapters say something else"
    scheduler.check()


async def test_what_one_adapter_computed_is_for_no_other(adapted):
    device, meant, pairs = adapted
    prompt = list(range(1, 14))
    _, engine = make_engine(device, pairs)
    async with engine:
        for known in (0, 12):
            for adapter in (BASE, FIRST, SECOND):
                want = greedy(meant[adapter], prompt, 5)
                assert await ask(engine, prompt, 5, adapter) == (want, known)
        engine.drop_adapter(FIRST)
        engine.add_adapter(THIRD, pairs[THIRD])  # in its place; the rest stays what it is
        for adapter, known in ((THIRD, 0), (SECOND, 12), (BASE, 12)):
            want = greedy(meant[adapter], prompt, 5)
            assert await ask(engine, prompt, 5, adapter) == (want, known)


async def test_loading_and_unloading_beside_running_requests(runner, tmp_path):
    device, arrays = runner
    folders, meant = {}, {}
    for seed, name in enumerate("abc", 20):
        tensors, added = peft.draw(CONFIG, 3, seed, scale=0.6)
        folders[name] = str(peft.write(tmp_path / name, tensors, 3))
        meant[name] = greedy(peft.merged(arrays, added), (7, 8, 9), 40)
    peft.write(tmp_path / "large", peft.draw(CONFIG, 5, 1)[0], 5)
    _, engine = make_engine(device, None)
    wanted = {"a": folders["a"]}
    loaded = LoadedAdapters(engine, CONFIG, SHAPE.adapters, jnp.float32, tmp_path, wanted)
    with CompileCounter() as counter:
        async with engine:
            await loaded.load_wanted()
            a = loaded.loaded["a"].adapter
            going = asyncio.create_task(ask(engine, (7, 8, 9), 40, a))
            beside = asyncio.create_task(ask(engine, (7, 8, 9), 40, BASE))
            await asyncio.sleep(0.005)
            await loaded.load("b", folders["b"])
            b = loaded.loaded["b"].adapter
            assert not going.done(), "it was meant to be loaded beside a request"
            with pytest.raises(InvalidRequest, match="adapter 'a' has already been loaded"):
                await loaded.load("a", folders["c"])
            loaded.unload("a")
            with pytest.raises(ModelNotFound, match="unloaded"):
                await ask(engine, (7, 8, 9), 40, a)
            with pytest.raises(ModelNotFound, match="adapter 'a' cannot be found"):
                loaded.unload("a")
            with pytest.raises(InvalidRequest, match="room for 2 adapters, 1 of which requests"):
                await loaded.load("c", folders["c"])
            assert (await ask(engine, (7, 8, 9), 40, b))[0] == meant["b"]
            assert (await going)[0] == meant["a"]
            assert (await beside)[0] == greedy(arrays, (7, 8, 9), 40)
            with pytest.raises(ConfigError, match=r"rank 5.* lora\.max_rank=5"):
                await loaded.load("c", str(tmp_path / "large"))
            with pytest.raises(ModelNotFound, match="no adapter 'nowhere'"):
                await loaded.load("c", "nowhere")
            await loaded.load("c", folders["c"])
            c = loaded.loaded["c"].adapter
            assert (c.index, c.serial) == (a.index, 3)
            both = await asyncio.gather(*(ask(engine, (7, 8, 9), 40, one) for one in (c, b)))
            assert [tokens for tokens, _ in both] == [meant["c"], meant["b"]]
    assert counter.compiles == 0
    assert wanted == {"b": folders["b"], "c": folders["c"]}


def test_rows_without_an_adapter_run_the_program_of_a_server_without_any(adapted, monkeypatch):
    device, *_ = adapted
    ran = []
    programs = {
        name: lambda *args, n=name, p=p: ran.append(n) or p(*args)
        for name, p in device._programs.items()
    }
    monkeypatch.setattr(device, "_programs", programs)
    rules = Sampling(max_tokens=1, temperature=0.0)
    for index, want in ((0, "forward[4]"), (2, "adapted[4]")):
        admission = Admission(1, 0, (5, 6), 2, rules, adapter=index)
        device.run(Plan(0, (admission,), (Work(1, 0, 0, 2, 0, (0,), True),)))
        assert want in ran
        ran.clear()


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mixtral"])
def test_families(family, tmp_path):
    """Norms behind the sum, queries to values stored as one, attention alone."""
    config = replace(FAMILIES[family], tied_head=False)
    bounds = {"max_slots": 4, "step_tokens": 4, "max_context": 8, "page_size": 8, "num_pages": 4}
    shape = StepShape(**bounds, adapters=AdapterRoom(3, 2))
    device, arrays = build_runner(config, shape)
    tensors, added = peft.draw(config, 2, 5)
    folder = peft.write(tmp_path / "adapter", tensors, 2)
    prompt = (3, 1, 4, 1)
    rules = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    with device:
        device.adapt(3, read_adapter(folder, config, 2, jnp.float32))
        for index, meant in ((0, arrays), (3, peft.merged(arrays, added)), (1, arrays)):
            admission = Admission(1, 0, prompt, 4, rules, adapter=index)
            result = device.run(Plan(0, (admission,), (Work(1, 0, 0, 4, 0, (0,), True),)))
            logits = oracle.logits(config, meant, np.array(prompt))
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            want = [logits[at, token] for at, token in enumerate(prompt[1:])]
            got = [scored.logprob for scored in result.scored[1]]
            assert got == pytest.approx(want, abs=2e-4), index
