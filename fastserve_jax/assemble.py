"""Joins the parts into something that runs: files, device, scheduler, text. The only such place.

`load` is slow and may run in a thread of its own; it touches no event loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import msgspec
from jax.typing import DTypeLike

from fastserve_jax.adapters import LoadedAdapters
from fastserve_jax.api.sampling import Defaults
from fastserve_jax.chips import GPU_FRACTION
from fastserve_jax.config import Settings
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.proposal import DraftCost
from fastserve_jax.core.replicas import Replicas
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.draft_model import DraftModel, measure_draft
from fastserve_jax.engine import Engine, StepRecord
from fastserve_jax.fitting import Fitted, find_draft, fit
from fastserve_jax.group.leader import START_S, Leader
from fastserve_jax.group.membership import Membership
from fastserve_jax.models.adapters import empty_adapters
from fastserve_jax.models.config import ModelConfig, Seq2SeqConfig
from fastserve_jax.models.decoder import State
from fastserve_jax.reading import read
from fastserve_jax.runtime.compile import Compiled, compile_all, keep_compiled
from fastserve_jax.runtime.drafter import Drafter, empty_draft_pages
from fastserve_jax.runtime.host import empty_host_pages
from fastserve_jax.runtime.hosts import divide_cpu, join
from fastserve_jax.runtime.measured import measured
from fastserve_jax.runtime.memory import MemoryPlan, give_back_memory
from fastserve_jax.runtime.mesh import over
from fastserve_jax.runtime.runner import DeviceRunner
from fastserve_jax.runtime.shapes import Program
from fastserve_jax.runtime.step import empty_pages, programs
from fastserve_jax.runtime.traced import lower_kept
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.weights.load import ModelFiles, open_model


class Report(Protocol):
    """Hears what loading is at."""

    def pull(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...
    def opened(self, files: ModelFiles) -> None: ...
    def meeting(self, num_hosts: int, coordinator: str) -> None: ...
    def weights(self, done: int, total: int) -> None: ...
    def memory(self, plan: MemoryPlan) -> None: ...
    def compiled(self, program: Compiled) -> None: ...


class Silent:
    """A Report that says nothing."""

    def pull(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...
    def opened(self, files: ModelFiles) -> None: ...
    def meeting(self, num_hosts: int, coordinator: str) -> None: ...
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
    dtype: DTypeLike = jnp.bfloat16  # of what is not quantised

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids that an answer begins behind, whatever the prompt is."""
        config = self.config
        return (config.start_token,) if isinstance(config, Seq2SeqConfig) else ()

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

    def adapters(
        self, engine: Engine, cache_dir: Path, wanted: dict[str, str]
    ) -> LoadedAdapters | None:
        """None is loaded yet. None where there is no room."""
        room = self.runner.shape.adapters
        if not room.count:
            return None
        return LoadedAdapters(engine, self.config, room, self.dtype, cache_dir, wanted)


class Group(Protocol):
    """The other hosts, if there are any."""

    membership: Membership

    def agree(self, facts: Mapping[str, str], limits: Limits) -> Limits: ...
    def ready(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on its devices, every program compiled."""

    fitted: Fitted
    runner: DeviceRunner
    compile_s: float
    programs: int

    @property
    def facts(self) -> tuple[object, ...]:
        """What its steps' cost hangs on."""
        files, division = self.fitted.files, self.fitted.division
        mesh = division and dict(division.mesh.shape)
        return files.name, files.config, jax.tree.leaves(self.fitted.empty), mesh


def load(
    reference: str,
    settings: Settings,
    cache_dir: Path,
    report: Report | None = None,
    leader: Leader | None = None,
) -> Loaded:
    """Raises OperatorErrors: what cannot be found, read, or fitted, and what to do. With a
    `leader` of a group, its other hosts have their parts."""
    # A bad name is found before the slow part.
    make_policy(settings.engine.policy, Limits(), CostModel())

    def text(files: ModelFiles) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = load_tokenizer(files.tokenizer_source)
        return tokenizer, ChatTemplate(tokenizer)

    placed, (tokenizer, template) = place(
        reference, settings, cache_dir, text, report or Silent(), leader
    )
    runner = placed.runner
    fitted, files = placed.fitted, placed.fitted.files
    cost = measured(runner, cache_dir / "measured", placed.facts)
    draft = fitted.draft
    return Loaded(
        name=files.name,
        config=files.config,
        limits=fitted.limits,
        runner=runner,
        tokenizer=tokenizer,
        template=template,
        defaults=msgspec.convert(dict(files.sampling), Defaults, strict=False),
        compile_s=placed.compile_s,
        programs=placed.programs,
        settings=settings,
        cost=cost,
        draft_cost=None if draft is None else measure_draft(runner, draft.shape),
        dtype=fitted.precision.dtype,
        replicas=1 if fitted.division is None else fitted.division.replicas,
    )


def place[T](
    reference: str,
    settings: Settings,
    cache_dir: Path,
    beside: Callable[[ModelFiles], T],
    report: Report,
    group: Group | None = None,
) -> tuple[Placed, T]:
    """What `beside` makes of the files is made while programs compile."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_FRACTION))  # not jax's .75
    if settings.mesh.cpu_devices:
        divide_cpu(settings.mesh.cpu_devices)
    files = open_model(reference, cache_dir, report.pull)
    report.opened(files)
    if group is not None:
        member = group.membership
        report.meeting(member.num_hosts, member.coordinator)
        join(member.coordinator, member.num_hosts, member.host_id, START_S)
    draft = find_draft(files, settings, cache_dir, report.pull)
    if draft is not None:
        report.opened(draft.files)
    fitted = fit(files, settings, draft)
    if group is not None:
        fitted = replace(fitted, limits=group.agree(_facts(fitted, settings), fitted.limits))
    report.memory(fitted.memory)
    keep_compiled(cache_dir / "compiled")
    began = time.perf_counter()
    # Shapes are all that compiling needs: the rest is made beside it.
    with ThreadPoolExecutor(2, thread_name_prefix="load") as pool:
        compiling = pool.submit(_compiled, fitted, cache_dir / "traced", report)
        making = pool.submit(_arrays, fitted, cache_dir / "converted", report)
        made = beside(files)
        programs, (params, kv_pages, host_pages) = compiling.result(), making.result()
        drafter = None if draft is None else _drafter(draft, programs, cache_dir, report)
    give_back_memory()
    mesh = None if fitted.division is None else fitted.division.mesh
    watcher = group if isinstance(group, Leader) else None
    room, adapters = fitted.adapters, None
    if room.count:
        adapters = empty_adapters(files.config, room, fitted.precision.dtype)
    given = (files.config, params, kv_pages, fitted.shape, programs, host_pages, drafter, mesh)
    runner = DeviceRunner(*given, watcher, adapters)
    if group is not None:
        group.ready()
    return Placed(fitted, runner, time.perf_counter() - began, len(programs)), made


def _facts(fitted: Fitted, settings: Settings) -> dict[str, str]:
    """What hosts of a group must have alike, by what a person would look for."""
    files = fitted.files
    mesh = "" if fitted.division is None else str(dict(fitted.division.mesh.shape))
    return {
        "fastserve-jax": version("fastserve-jax"),
        "jax": jax.__version__,
        "model": f"{files.config}",
        "file": f"{files.path.name}, {files.size_bytes:,} bytes",
        "precision": f"{fitted.precision}",
        "mesh": mesh,
        "settings": f"{settings.model} {settings.kv} {settings.engine}",
    }


def _compiled(fitted: Fitted, folder: Path, report: Report) -> dict[str, jax.stages.Compiled]:
    jobs = [*programs(fitted.steps, fitted.empty, fitted.precision.dtype)]
    of_model = (fitted.files.config, fitted.shape, fitted.precision)
    facts: dict[str, object] = {job.name: of_model for job in jobs}
    if fitted.draft is not None:
        jobs += (drafting := [*fitted.draft.programs()])
        facts |= {job.name: fitted.draft.facts for job in drafting}

    def traced(job: Program) -> jax.stages.Lowered:
        if fitted.division is not None:
            return over(job, fitted.division.mesh).lower()
        return lower_kept(job, folder=folder, facts=facts[job.name])

    return compile_all(jobs, report.compiled, traced)


def _arrays(
    fitted: Fitted, folder: Path, report: Report
) -> tuple[State, list[jax.Array], jax.Array | None]:
    """Parameters, KV pages and host pages: the last two not beside what converting takes."""
    division, shape, dtype = fitted.division, fitted.shape, fitted.precision.dtype
    mesh, own = division.mesh if division else None, fitted.parts.of(fitted.files.config)
    params = read(fitted.files, fitted.precision, fitted.empty, division, folder, report.weights)
    give_back_memory()
    host_pages = empty_host_pages(shape.host_layout(own), dtype, mesh)
    return params, empty_pages(own, shape, dtype, mesh), host_pages


def _drafter(
    draft: DraftModel,
    compiled: Mapping[str, jax.stages.Compiled],
    cache_dir: Path,
    report: Report,
) -> Drafter:
    params = read(
        draft.files, draft.precision, draft.empty, None, cache_dir / "converted", report.weights
    )
    kv_pages = empty_draft_pages(draft.config, draft.shape, draft.precision.dtype)
    return Drafter(params, kv_pages, draft.shape, compiled)
