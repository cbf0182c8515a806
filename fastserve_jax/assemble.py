"""Joins the parts into something that runs: files, device, scheduler, text. The only such place.

`load` is slow and may run in a thread of its own; it touches no event loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import msgspec
from jax.typing import DTypeLike

from fastserve_jax.api.sampling import Defaults
from fastserve_jax.chips import GPU_FRACTION
from fastserve_jax.config import MOST_CONTEXT, EngineSettings, ModelSettings, Settings
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.proposal import DraftCost
from fastserve_jax.core.replicas import Replicas
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.draft_model import DraftModel, measure_draft, open_draft, plan_draft
from fastserve_jax.engine import Engine, StepRecord
from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import State, abstract
from fastserve_jax.models.parts import MODEL, WHOLE, Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.reading import Division, read
from fastserve_jax.runtime.compile import Compiled, compile_all, keep_compiled
from fastserve_jax.runtime.drafter import Drafter, empty_draft_pages
from fastserve_jax.runtime.host import empty_host_pages
from fastserve_jax.runtime.measured import measured
from fastserve_jax.runtime.memory import (
    MemoryPlan,
    free_host_memory,
    free_memory,
    give_back_memory,
    plan_host_pages,
    plan_memory,
)
from fastserve_jax.runtime.mesh import DATA, choose_axes, make_mesh, over, replicas_of
from fastserve_jax.runtime.runner import DeviceRunner
from fastserve_jax.runtime.shapes import Program
from fastserve_jax.runtime.step import Steps, StepShape, empty_pages, programs
from fastserve_jax.runtime.traced import lower_kept
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.weights.load import ModelFiles, open_model
from pallas_kernels import cpu

MOST_PERPLEXITY = 1.01  # int8's over bf16's, for int8 to be what nobody asked for
MOST_GUESSES, FEW_GUESSES = 15, 7  # with the token before them, 16 and 8


class Report(Protocol):
    """Hears what loading is at."""

    def pull(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...
    def opened(self, files: ModelFiles) -> None: ...
    def weights(self, done: int, total: int) -> None: ...
    def memory(self, plan: MemoryPlan) -> None: ...
    def compiled(self, program: Compiled) -> None: ...


class Silent:
    """A Report that says nothing."""

    def pull(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...
    def opened(self, files: ModelFiles) -> None: ...
    def weights(self, done: int, total: int) -> None: ...
    def memory(self, plan: MemoryPlan) -> None: ...
    def compiled(self, program: Compiled) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run: every program compiled, nothing running yet."""

    name: str
    config: ModelConfig
    limits: Limits
    runner: DeviceRunner
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: Defaults
    compile_s: float
    programs: int
    settings: Settings
    cost: CostModel  # of its steps, as measured here
    draft_cost: DraftCost | None = None  # of a draft model, where there is one
    replicas: int = 1

    def scheduler(self, policy: str | None = None) -> Scheduler | Replicas:
        """A new one, with nobody in it; `policy` None takes the setting."""
        name = policy or self.settings.engine.policy
        made = [self._scheduler(name) for _ in range(self.replicas)]
        return made[0] if len(made) == 1 else Replicas(made)

    def _scheduler(self, policy: str) -> Scheduler:
        cost = self.cost.copy()
        made = make_policy(policy, self.limits, cost)
        draft_cost = None if self.draft_cost is None else self.draft_cost.copy()
        return Scheduler(self.limits, made, cost, draft_cost)

    def engine(
        self,
        on_step: Callable[[StepRecord], None] | None = None,
        overlap: bool | None = None,
        scheduler: Scheduler | Replicas | None = None,
    ) -> Engine:
        """A new engine over the one runner; None takes the settings."""
        if overlap is None:
            overlap = self.settings.engine.overlap
        scheduler = scheduler or self.scheduler()
        return Engine(scheduler, self.runner, overlap=overlap, on_step=on_step)


def load(
    reference: str, settings: Settings, cache_dir: Path, report: Report | None = None
) -> Loaded:
    """Raises OperatorErrors: what cannot be found, read, or fitted, and what to do."""
    report = report or Silent()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))  # not jax's .75
    if settings.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", settings.mesh.cpu_devices)  # type: ignore[no-untyped-call]
    # A bad name is found before the slow part.
    make_policy(settings.engine.policy, Limits(), CostModel())
    files = open_model(reference, cache_dir, report.pull)
    report.opened(files)
    config = files.config
    division = _division(config, settings)
    mesh, parts = (None, WHOLE) if division is None else (division.mesh, division.parts)
    precision = _precision(settings.model, files)
    dtype = precision.dtype
    graph, empty = abstract(config, precision, parts)  # of one device
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
    draft = _draft(files, settings, cache_dir, report) if settings.model.draft else None
    limits, plan = _limits(config, settings, weight_bytes, dtype, draft, division)
    report.memory(plan)
    shape = StepShape(
        max_slots=limits.max_slots,
        step_tokens=limits.step_tokens,
        max_context=limits.max_context,
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        host_pages=limits.host_pages,
        guesses=limits.guesses,
    )
    keep_compiled(cache_dir / "compiled")
    began = time.perf_counter()
    # Shapes are all that compiling needs: the rest is made beside it.
    with ThreadPoolExecutor(4, thread_name_prefix="load") as pool:
        jobs = [*programs(Steps(graph, config, shape, parts), empty, dtype)]
        facts: dict[str, object] = {job.name: (config, shape, precision) for job in jobs}
        if draft is not None:
            jobs += (drafting := [*draft.programs()])
            facts |= {job.name: draft.facts for job in drafting}

        def traced(job: Program) -> jax.stages.Lowered:
            if mesh is not None:
                return over(job, mesh).lower()
            return lower_kept(job, folder=cache_dir / "traced", facts=facts[job.name])

        compiling = pool.submit(compile_all, jobs, report.compiled, traced)
        converted = cache_dir / "converted"
        reading = pool.submit(read, files, precision, division, converted, report.weights)
        own = parts.of(config)
        layout = shape.host_layout(own)
        paging = pool.submit(_after, reading, lambda: empty_pages(own, shape, dtype, mesh))
        hosting = pool.submit(_after, reading, lambda: empty_host_pages(layout, dtype, mesh))
        tokenizer = load_tokenizer(files.tokenizer_source)
        template = ChatTemplate(tokenizer)
        compiled = compiling.result()
        params, kv_pages, host_pages = reading.result(), paging.result(), hosting.result()
        drafter = None if draft is None else _drafter(draft, compiled, cache_dir, report)
    give_back_memory()
    runner = DeviceRunner(config, params, kv_pages, shape, compiled, host_pages, drafter, mesh)
    compile_s = time.perf_counter() - began
    facts_of_cost = (files.name, config, jax.tree.leaves(empty), mesh and dict(mesh.shape))
    cost = measured(runner, cache_dir / "measured", facts_of_cost)
    return Loaded(
        name=files.name,
        config=config,
        limits=limits,
        runner=runner,
        tokenizer=tokenizer,
        template=template,
        defaults=msgspec.convert(dict(files.sampling), Defaults, strict=False),
        compile_s=compile_s,
        programs=len(compiled),
        settings=settings,
        cost=cost,
        draft_cost=None if draft is None else measure_draft(runner, draft.shape),
        replicas=replicas_of(mesh),
    )


def _after[T](reading: Future[State], made: Callable[[], T]) -> T:
    """Not beside what converting takes for a while."""
    wait([reading])
    give_back_memory()
    return made()


def _draft(files: ModelFiles, settings: Settings, cache_dir: Path, report: Report) -> DraftModel:
    """The draft model that settings name, opened and fitted beside `files`."""
    found = open_draft(settings.model.draft, cache_dir, files, report.pull)
    report.opened(found)
    return plan_draft(
        found,
        _precision(settings.model, found),
        max_slots=settings.engine.max_slots,
        max_context=_max_context(files.config, settings.engine),
        step_tokens=settings.engine.step_tokens,
        page_size=settings.kv.page_size,
    )


def _drafter(
    draft: DraftModel,
    compiled: Mapping[str, jax.stages.Compiled],
    cache_dir: Path,
    report: Report,
) -> Drafter:
    params = read(draft.files, draft.precision, None, cache_dir / "converted", report.weights)
    kv_pages = empty_draft_pages(draft.config, draft.shape, draft.precision.dtype)
    return Drafter(params, kv_pages, draft.shape, compiled)


def _max_context(config: ModelConfig, engine: EngineSettings) -> int:
    return min(config.max_context, engine.max_context or MOST_CONTEXT)


def _division(config: ModelConfig, settings: Settings) -> Division | None:
    """Of the model among all devices there are; None where that is one."""
    devices = jax.devices()
    axes = choose_axes(config, len(devices), asdict(settings.mesh))
    if len(devices) == 1:
        return None
    if settings.model.draft:
        raise ConfigError("model.draft is for one device: take mesh.data and mesh.model as 1")
    return Division(make_mesh(devices, axes[DATA], axes[MODEL]), Parts(axes[MODEL]))


def _limits(
    config: ModelConfig,
    settings: Settings,
    weight_bytes: int,
    dtype: DTypeLike,
    draft: DraftModel | None,
    division: Division | None,
) -> tuple[Limits, MemoryPlan]:
    """Of each replica, and what one device has of it."""
    engine, device = settings.engine, jax.local_devices()[0]
    max_context = _max_context(config, engine)
    parts = WHOLE if division is None else division.parts
    plan = plan_memory(
        replace(parts.of(config), vocab_size=config.vocab_size),  # logits are joined
        dtype,
        weight_bytes,
        page_size=settings.kv.page_size,
        num_pages=settings.kv.pages,
        max_context=max_context,
        max_slots=engine.max_slots,
        step_tokens=engine.step_tokens,
        free=free_memory(device),
        draft_bytes=0 if draft is None else draft.bytes,
    )
    plan = plan_host_pages(plan, settings.kv.host_pages, free_host_memory(device))
    limits = Limits(
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        host_pages=plan.host_pages,
        max_slots=engine.max_slots,
        step_tokens=engine.step_tokens,
        max_context=max_context,
        max_queue=engine.max_queue,
        max_live=engine.max_queue + engine.max_slots,
        guesses=_guesses(engine) if division is None or replicas_of(division.mesh) == 1 else 0,
        drafts=0 if draft is None else draft.shape.rows,
        draft_context=0 if draft is None else draft.shape.context,
    )
    return limits, plan


def _guesses(engine: EngineSettings) -> int:
    """Tokens guessed at once: as many as leave a step's draws what they are, or a few."""
    if engine.speculate == "off":
        return 0
    return min(MOST_GUESSES, max(FEW_GUESSES, engine.max_slots - 1))


def _precision(settings: ModelSettings, files: ModelFiles) -> Precision:
    """auto is int8 where it is fast here and costs this model next to nothing, as measured."""
    dtype = jnp.float32 if settings.dtype == "f32" else jnp.bfloat16
    int8 = settings.dtype == "int8"
    if settings.dtype == "auto" and files.int8_perplexity is not None:
        int8 = cpu.runs() and files.int8_perplexity <= MOST_PERPLEXITY
    return Precision(dtype, int8, settings.int8_keep)
