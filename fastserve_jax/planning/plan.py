"""The very step that serves, compiled for chips that are not here, and what the compiler says.

Two steps: `decode`, a token for each slot, and `mixed`, which is filled up with prompts. The
process must have been told that there is nothing here to find before jax was imported; see
chips.py.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from fastserve_jax.runtime.memory import accelerator_memory, size_of
from fastserve_jax.runtime.mesh import over
from fastserve_jax.runtime.shapes import Program

from .site import Site

_COLLECTIVE = re.compile(
    r"= [^=]*?\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*)"')
# Sorting by CUB's library would ask a GPU how much memory that takes.
_OPTIONS = {"gpu": {"xla_gpu_enable_cub_radix_sort": False}}
_BATCHES = (1, 8, 32, 128, 512)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a whole step at its floor, see floor.py: no step is faster."""

    batch: int  # sequences, over all replicas
    bytes_read: int  # by one device
    operations: int
    floor_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One compiled step. Bytes are those of one device; what was not compiled has none."""

    model: str
    chip: str
    program: str  # "decode" or "mixed"
    devices: int
    mesh: dict[str, int]
    fits: bool
    why_not: str = ""
    memory_bytes: int  # that a device has
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    weight_bytes: int
    kv_cache_bytes: int
    alias_bytes: int | None = None  # updated in place
    temp_bytes: int | None = None
    host_temp_bytes: int | None = None
    collectives: dict[str, int] = field(default_factory=dict)  # of the decoder
    # Behind it: logits are joined, and every host is told what was drawn on each replica.
    drawing_collectives: dict[str, int] = field(default_factory=dict)
    kernels: int | None = None
    compile_s: float | None = None
    kv_pages: int  # of all replicas
    page_size: int
    context: int
    slots: int  # of all replicas
    tokens: int  # of one step of a replica
    max_concurrent: int  # requests of the whole context that pages are there for
    step: tuple[Estimate, ...] = ()


def plan(site: Site, report: Callable[[str], None] = lambda _: None) -> list[Planned]:
    """A decode and a mixed step."""
    shape = site.steps.shape
    one_each = next(size for size in shape.token_buckets if size >= shape.max_slots)
    steps = (("decode", one_each), ("mixed", shape.token_buckets[-1]))
    room = accelerator_memory(site.chips.rates.memory_bytes).free_bytes
    if site.needed_bytes > room:
        why = (
            f"weights {size_of(site.memory.weight_bytes)}, one request's pages "
            f"{size_of(site.memory.kv_bytes)} and a step {size_of(site.memory.work_bytes)} do not "
            f"go into {size_of(room)}, which is what there is beside XLA's own"
        )
        return [_refused(site, step, tokens, site.needed_bytes, why) for step, tokens in steps]
    known = site.programs()
    rows = known[f"sample[{shape.row_buckets[-1]}]"]
    planned = []
    for step, tokens in steps:
        report(f"compiling the {step} step, {tokens} tokens, for {site.chip}")
        planned.append(_compiled(site, step, tokens, [known[f"forward[{tokens}]"], rows]))
    return planned


def _refused(site: Site, step: str, tokens: int, peak: int | None, why: str) -> Planned:
    return Planned(**_facts(site, step, tokens), fits=False, why_not=why, peak_bytes=peak)


def _compiled(site: Site, step: str, tokens: int, pieces: list[Program]) -> Planned:
    began = time.perf_counter()
    facts = _facts(site, step, tokens)
    try:
        with jax.default_device(site.chips.devices[0]):  # whose kernels they are
            lowered = [over(piece, site.mesh).lower() for piece in pieces]
        options = _OPTIONS.get(site.chips.platform)
        built = [piece.compile(compiler_options=options) for piece in lowered]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
            raise
        return _refused(site, step, tokens, None, " ".join(str(error).split())[:300])
    compile_s = time.perf_counter() - began
    memories: list[Any] = [program.memory_analysis() for program in built]
    first = memories[0]
    texts = [program.as_text() or "" for program in built]
    # The second runs beside the weights and the pages that only the first is given.
    beside = first.argument_size_in_bytes
    peak = beside + max(_grown(memory) for memory in memories)
    return Planned(
        **facts,
        fits=peak <= site.chips.rates.memory_bytes,
        peak_bytes=peak,
        argument_bytes=first.argument_size_in_bytes,
        alias_bytes=first.alias_size_in_bytes,
        temp_bytes=max(memory.temp_size_in_bytes for memory in memories),
        host_temp_bytes=max(memory.host_temp_size_in_bytes for memory in memories),
        collectives=_collectives(texts[0]),
        drawing_collectives=_collectives(texts[1]),
        kernels=sum(len(_KERNEL.findall(text)) for text in texts),
        compile_s=round(compile_s, 2),
    )


def _collectives(text: str) -> dict[str, int]:
    return dict(Counter(found[1] for found in _COLLECTIVE.finditer(text)))


def _grown(memory: Any) -> int:
    """What a program takes beyond its arguments."""
    new: int = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes) + max(0, new)


def _facts(site: Site, step: str, tokens: int) -> dict[str, Any]:
    shape, replicas, memory = site.steps.shape, site.replicas, site.memory
    slots, is_decode = shape.max_slots * replicas, step == "decode"
    batches = sorted({*(b for b in _BATCHES if b < slots), slots}) if is_decode else [slots]
    estimates = []
    for batch in batches:
        rows = -(-batch // replicas)
        work = site.sizes.work(rows, rows if is_decode else tokens, _context(site, rows))
        floor_s = work.floor_s(site.chips.rates, site.precision.int8)
        made = batch if is_decode else tokens * replicas
        rate = round(made / floor_s, 1)
        estimates.append(Estimate(batch, work.bytes_read, work.operations, floor_s, rate))
    return {
        "model": site.name,
        "chip": site.chip,
        "program": step,
        "devices": len(site.chips.devices),
        "mesh": dict(site.mesh.shape),
        "memory_bytes": site.chips.rates.memory_bytes,
        "weight_bytes": memory.weight_bytes,
        "kv_cache_bytes": memory.kv_bytes,
        "kv_pages": memory.num_pages * replicas,
        "page_size": memory.page_size,
        "context": shape.max_context,
        "slots": slots,
        "tokens": tokens,
        "max_concurrent": memory.num_pages // shape.pages_per_row * replicas,
        "step": tuple(estimates),
    }


def _context(site: Site, rows: int) -> int:
    """Of each of so many sequences: what they may have, or what there are pages for."""
    memory = site.memory
    return min(site.steps.shape.max_context, memory.num_pages * memory.page_size // rows)
