"""What of a model goes where, and how much of everything: decided before anything is made.

From settings, files and what memory there is. Allocates nothing, compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from fastserve_jax.config import (
    MOST_CONTEXT,
    EngineSettings,
    LoraSettings,
    ModelSettings,
    Settings,
    asked_axes,
)
from fastserve_jax.core.sequence import Limits
from fastserve_jax.draft_model import DraftModel, open_draft, plan_draft
from fastserve_jax.errors import ConfigError
from fastserve_jax.models.adapters import NO_ROOM, AdapterRoom, empty_adapters
from fastserve_jax.models.config import ModelConfig, Seq2SeqConfig
from fastserve_jax.models.decoder import Decoder, State
from fastserve_jax.models.parts import WHOLE, Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.seq2seq import Seq2Seq, abstract
from fastserve_jax.reading import Division
from fastserve_jax.runtime.memory import (
    MemoryPlan,
    free_host_memory,
    free_memory,
    plan_host_pages,
    plan_memory,
)
from fastserve_jax.runtime.mesh import choose_axes, make_mesh, slices_of
from fastserve_jax.runtime.step import Steps, StepShape
from fastserve_jax.weights.load import ModelFiles
from fastserve_jax.weights.pull import Progress
from pallas_kernels import cpu

MOST_PERPLEXITY = 1.01  # int8's over bf16's, for int8 to be what nobody asked for
MOST_GUESSES, FEW_GUESSES = 15, 7  # with the token before them, 16 and 8


@dataclass(frozen=True, slots=True)
class Fitted:
    """`limits` are those of a replica; `graph`, `empty` and `memory` speak of one device."""

    files: ModelFiles
    division: Division | None  # None: one device
    precision: Precision
    graph: nnx.GraphDef[Decoder] | nnx.GraphDef[Seq2Seq]
    empty: State  # parameters as shapes
    draft: DraftModel | None
    limits: Limits
    memory: MemoryPlan
    adapters: AdapterRoom = NO_ROOM

    @property
    def parts(self) -> Parts:
        return WHOLE if self.division is None else self.division.parts

    @property
    def shape(self) -> StepShape:
        limits = self.limits
        return StepShape(
            max_slots=limits.max_slots,
            step_tokens=limits.step_tokens,
            max_context=limits.max_context,
            page_size=limits.page_size,
            num_pages=limits.num_pages,
            host_pages=limits.host_pages,
            guesses=limits.guesses,
            adapters=self.adapters,
            encodes=limits.encodes,
        )

    @property
    def steps(self) -> Steps:
        return Steps(self.graph, self.files.config, self.shape, self.parts)


def fit(files: ModelFiles, settings: Settings, draft: DraftModel | None) -> Fitted:
    """On all devices there are. Raises ConfigError and DoesNotFit."""
    division = _division(files.config, settings)
    encodes = isinstance(files.config, Seq2SeqConfig)
    if encodes and division is not None:
        raise ConfigError(
            f"{files.name} has an encoder, which runs on one device, and there are "
            f"{division.mesh.size}: let one be seen (CUDA_VISIBLE_DEVICES=0, TPU_VISIBLE_CHIPS=0)"
        )
    precision = precision_of(settings.model, files)
    parts = WHOLE if division is None else division.parts
    graph, empty = abstract(files.config, precision, parts)
    settings = _with_room_for_sources(files.config, settings)
    room = _room(files.config, settings.lora)
    adapters = jax.eval_shape(lambda: empty_adapters(files.config, room, precision.dtype))
    memory = _memory(files.config, settings, precision, (empty, adapters), parts, draft)
    engine = settings.engine
    limits = Limits(
        page_size=memory.page_size,
        num_pages=memory.num_pages,
        host_pages=memory.host_pages,
        max_slots=engine.max_slots,
        step_tokens=engine.step_tokens,
        max_context=_max_context(files.config, engine),
        max_queue=engine.max_queue,
        max_live=engine.max_queue + engine.max_slots,
        # Replicas step together, and one that guesses would have the others wait.
        guesses=0 if encodes or (division and division.replicas > 1) else _guesses(engine),
        drafts=0 if draft is None else draft.shape.rows,
        draft_context=0 if draft is None else draft.shape.context,
        encodes=encodes,
    )
    return Fitted(files, division, precision, graph, empty, draft, limits, memory, room)


def _room(config: ModelConfig | Seq2SeqConfig, lora: LoraSettings) -> AdapterRoom:
    if lora.count and isinstance(config, Seq2SeqConfig):
        raise ConfigError("adapters are served beside decoders, not beside an encoder-decoder")
    if lora.count and jax.device_count() > 1:
        raise ConfigError(
            f"adapters are served on one device, and there are {jax.device_count()}: merge them "
            "into the model, or let one be seen (CUDA_VISIBLE_DEVICES=0, TPU_VISIBLE_CHIPS=0)"
        )
    return AdapterRoom(lora.count, lora.max_rank) if lora.count else NO_ROOM


def find_draft(
    files: ModelFiles,
    settings: Settings,
    cache_dir: Path,
    pull: Progress,
) -> DraftModel | None:
    """The draft model that settings name, opened and fitted beside `files`."""
    if not settings.model.draft:
        return None
    if isinstance(files.config, Seq2SeqConfig):
        raise ConfigError(f"{files.name} has an encoder: leave model.draft out, nothing is guessed")
    if jax.device_count() > 1:
        raise ConfigError(
            f"a draft model works on one device, and there are {jax.device_count()}: leave it out, "
            "or let one be seen (CUDA_VISIBLE_DEVICES=0, TPU_VISIBLE_CHIPS=0)"
        )
    found = open_draft(settings.model.draft, cache_dir, files, pull)
    return plan_draft(
        found,
        precision_of(settings.model, found),
        max_slots=settings.engine.max_slots,
        max_context=_max_context(files.config, settings.engine),
        step_tokens=settings.engine.step_tokens,
        page_size=settings.kv.page_size,
    )


def _division(config: ModelConfig, settings: Settings) -> Division | None:
    devices = jax.devices()
    axes = choose_axes(config, len(devices), asked_axes(settings.mesh), slices_of(devices))
    if len(devices) == 1:
        return None
    return Division(make_mesh(devices, **axes))


def _with_room_for_sources(config: ModelConfig, settings: Settings) -> Settings:
    """An encoder reads a source in one step: of the length that it was trained on at the least,
    whoever else runs a token."""
    if not isinstance(config, Seq2SeqConfig):
        return settings
    engine = settings.engine
    tokens = max(engine.step_tokens, config.trained_tokens + engine.max_slots)
    return replace(settings, engine=replace(engine, step_tokens=tokens))


def _memory(
    config: ModelConfig,
    settings: Settings,
    precision: Precision,
    held: object,
    parts: Parts,
    draft: DraftModel | None,
) -> MemoryPlan:
    """With all parameters that are `held`, as shapes."""
    engine, device = settings.engine, jax.local_devices()[0]
    plan = plan_memory(
        replace(parts.of(config), vocab_size=config.vocab_size),  # logits are joined
        precision.dtype,
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)),
        page_size=settings.kv.page_size,
        num_pages=settings.kv.pages,
        max_context=_max_context(config, engine),
        max_slots=engine.max_slots,
        step_tokens=engine.step_tokens,
        free=free_memory(device, settings.model.memory),
        draft_bytes=0 if draft is None else draft.bytes,
    )
    return plan_host_pages(plan, settings.kv.host_pages, free_host_memory(device))


def _max_context(config: ModelConfig, engine: EngineSettings) -> int:
    return min(config.max_context, engine.max_context or MOST_CONTEXT)


def _guesses(engine: EngineSettings) -> int:
    """Tokens guessed at once: as many as leave a step's draws what they are, or a few."""
    if engine.speculate == "off":
        return 0
    return min(MOST_GUESSES, max(FEW_GUESSES, engine.max_slots - 1))


def precision_of(settings: ModelSettings, files: ModelFiles) -> Precision:
    """auto is int8 where it is fast here and costs this model next to nothing, as measured. What
    was quantised before is served as it is stored, on several devices as bf16."""
    dtype = jnp.float32 if settings.dtype == "f32" else jnp.bfloat16
    if settings.dtype == "auto" and files.stored and jax.device_count() == 1:
        return Precision(dtype, stored=tuple(sorted(files.stored.items())))
    int8 = settings.dtype == "int8"
    if settings.dtype == "auto" and files.int8_perplexity is not None:
        int8 = cpu.runs() and files.int8_perplexity <= MOST_PERPLEXITY
    return Precision(dtype, int8, settings.int8_keep)
