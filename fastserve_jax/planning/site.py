"""A model on its chips, all decided before anything is compiled: mesh, parts, pages, bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastserve_jax.chips import Chips
from fastserve_jax.config import MOST_CONTEXT, Settings, asked_axes
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.decoder import State, abstract, head_of, parameters
from fastserve_jax.models.parts import Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.runtime.memory import FreeMemory, MemoryPlan, accelerator_memory, plan_memory
from fastserve_jax.runtime.mesh import choose_axes, make_mesh, parts_of, replicas_of
from fastserve_jax.runtime.shapes import Program
from fastserve_jax.runtime.step import Steps, StepShape, programs
from pallas_kernels import KVLayout

from .floor import Sizes

_ENDLESS = FreeMemory(2**62, 1.0, 1)


@dataclass(frozen=True, slots=True)
class Site:
    """`steps` and the arrays they take are those of one device."""

    name: str
    chip: str
    chips: Chips
    mesh: Mesh
    precision: Precision
    steps: Steps
    empty: State
    memory: MemoryPlan
    sizes: Sizes

    @property
    def replicas(self) -> int:
        return replicas_of(self.mesh)

    @property
    def needed_bytes(self) -> int:
        """By what is known without a compiler."""
        memory = self.memory
        return memory.weight_bytes + memory.work_bytes + memory.kv_bytes

    def programs(self) -> dict[str, Program]:
        return {p.name: p for p in programs(self.steps, self.empty, self.precision.dtype)}


def make_site(
    name: str,
    config: ModelConfig,
    settings: Settings,
    chip: str,
    found: Chips,
) -> Site:
    """Raises ConfigError for a mesh that cannot be, DoesNotFit where more pages are asked for than
    there is room; where not even one request fits, its pages are planned all the same."""
    axes = choose_axes(config, len(found.devices), asked_axes(settings.mesh), found.slices)
    mesh = make_mesh(found.devices, **axes)
    parts, precision = parts_of(mesh), _precision(settings.model.dtype)
    graph, empty = abstract(config, precision, parts)
    engine, own = settings.engine, parts.of(config)
    max_context = min(config.max_context, engine.max_context or MOST_CONTEXT)
    fitted: dict[str, Any] = {
        "weight_bytes": _bytes(empty),
        "page_size": settings.kv.page_size,
        "max_context": max_context,
        "max_slots": engine.max_slots,
        "step_tokens": engine.step_tokens,
    }
    whole_vocab = replace(own, vocab_size=config.vocab_size)  # logits are joined
    dtype, free = precision.dtype, accelerator_memory(found.rates.memory_bytes)
    one_request = -(-max_context // settings.kv.page_size)
    memory = plan_memory(whole_vocab, dtype, num_pages=one_request, free=_ENDLESS, **fitted)
    if memory.weight_bytes + memory.work_bytes + memory.kv_bytes <= free.free_bytes:
        pages = settings.kv.pages
        memory = plan_memory(whole_vocab, dtype, num_pages=pages, free=free, **fitted)
    shape = StepShape(
        max_slots=engine.max_slots,
        step_tokens=engine.step_tokens,
        max_context=max_context,
        page_size=memory.page_size,
        num_pages=memory.num_pages,
    )
    return Site(
        name=name,
        chip=chip,
        chips=found,
        mesh=mesh,
        precision=precision,
        steps=Steps(graph, config, shape, parts),
        empty=empty,
        memory=memory,
        sizes=_sizes(config, parts, empty, shape.layout(own), precision),
    )


def _precision(dtype: str) -> Precision:
    return Precision(jnp.float32 if dtype == "f32" else jnp.bfloat16, int8=dtype == "int8")


def _bytes(leaves: Any) -> int:
    return sum(int(leaf.size) * int(leaf.dtype.itemsize) for leaf in jax.tree.leaves(leaves))


def _sizes(
    config: ModelConfig, parts: Parts, empty: State, layout: KVLayout, precision: Precision
) -> Sizes:
    head = head_of(config, empty)
    looked_up = {"embed", "positions"} - ({"embed"} if config.tied_head else set())
    matrices = [leaf for name, leaf in parameters(empty).items() if name.startswith("layers.")]
    experts = [leaf for leaf in matrices if leaf.ndim == 3]
    return Sizes(
        config=config,
        parts=parts,
        weight_bytes=_bytes(empty),
        matrix_elements=sum(leaf.size for leaf in matrices if leaf.ndim == 2),
        expert_bytes=_bytes(experts),
        expert_elements=sum(leaf.size for leaf in experts),
        head_elements=head.weight.size,
        embed_bytes=sum(
            _bytes(leaf)
            for name, leaf in parameters(empty).items()
            if name.partition(".")[0] in looked_up
        ),
        token_bytes=layout.page_bytes(precision.dtype) // layout.page_size,
    )
