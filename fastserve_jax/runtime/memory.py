"""How many KV pages fit, on the device and in host memory: sizes in bytes, from shapes alone.

Allocates nothing.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.typing import DTypeLike

from fastserve_jax.errors import DoesNotFit
from fastserve_jax.models.config import ModelConfig, Seq2SeqConfig
from pallas_kernels import KVLayout, target

CPU_FRACTION = 0.05  # of all memory, for pages: a laptop has other uses for the rest
CPU_GRAIN = 1  # its pool is a power of two, so that a start finds the programs of the one before
DEVICE_FRACTION = 0.92  # of an accelerator's: the rest is XLA's, and what has gone to pieces
DEVICE_GRAIN = 16  # steps between two powers of two
HOST_FRACTION = 0.25  # of an accelerator's host's: pinned, so the kernel cannot make room
_BESIDE = "; where it is to be beside another, serve both with --set model.memory=.45"
MOST_HOST_BYTES = 48 << 30  # XLA pins 64 GiB for a GPU at the most, unless told otherwise


@dataclass(frozen=True, slots=True)
class FreeMemory:
    free_bytes: int
    fraction: float  # of it that pages may take
    grain: int  # a pool's pages are rounded down to 1 / grain of a power of two
    shared: bool = False  # host memory that is the device's too
    whole_bytes: int = 0  # where what is free varies from start to start: all there is

    @property
    def share_bytes(self) -> int:
        """What pages may take, if so much is free."""
        return int((self.whole_bytes or self.free_bytes) * self.fraction)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes where, all in bytes but for the counts."""

    free_bytes: int
    weight_bytes: int
    work_bytes: int  # logits and activations of one step, estimated
    page_bytes: int  # of one page, over all layers
    num_pages: int
    page_size: int
    host_pages: int = 0
    draft_bytes: int = 0  # a draft model's weights, and its KV pages

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def host_bytes(self) -> int:
        return self.page_bytes * self.host_pages

    def __str__(self) -> str:
        host = f"{size_of(self.host_bytes)} more in host memory ({self.host_pages} pages), "
        draft = f"draft model {size_of(self.draft_bytes)}, " if self.draft_bytes else ""
        return (
            f"weights {size_of(self.weight_bytes)}, {draft}KV {size_of(self.kv_bytes)} "
            f"({self.num_pages} pages of {self.page_size} tokens, "
            f"{self.num_pages * self.page_size:,} in all), {host if self.host_pages else ''}"
            f"step {size_of(self.work_bytes)}; {size_of(self.free_bytes)} free"
        )


def plan_memory(
    config: ModelConfig,
    dtype: DTypeLike,
    weight_bytes: int,
    *,
    page_size: int,
    num_pages: int,
    max_context: int,
    max_slots: int,
    step_tokens: int,
    free: FreeMemory,
    draft_bytes: int = 0,
) -> MemoryPlan:
    """Sizes the KV pool; `num_pages` 0 takes its fraction of what is free, never more than all
    slots at full context could use.

    Raises DoesNotFit, saying what would.
    """
    layout = KVLayout(1, config.num_kv_heads, page_size, config.head_dim, target().lanes)
    page_bytes = layout.page_bytes(dtype) * config.num_layers
    widest = 2 * config.intermediate_size + config.hidden_size * 4
    work_bytes = 4 * (3 * max_slots * config.vocab_size + 2 * step_tokens * widest)
    if isinstance(config, Seq2SeqConfig):  # see models/seq2seq.py
        work_bytes += 4 * 4 * config.num_heads * step_tokens**2
    one_request = -(-max_context // page_size)
    left = free.free_bytes - weight_bytes - work_bytes - draft_bytes
    if num_pages == 0:
        budget = min(left, free.share_bytes)
        num_pages = max(_round_down(budget // page_bytes, free.grain), one_request)
        num_pages = min(num_pages, one_request * max_slots)
    plan = MemoryPlan(
        *(free.free_bytes, weight_bytes, work_bytes, page_bytes, num_pages, page_size),
        draft_bytes=draft_bytes,
    )
    if plan.kv_bytes <= left:
        return plan
    fits = max(left, 0) // page_bytes
    if fits * page_size < 64:
        need = weight_bytes + work_bytes + draft_bytes + page_bytes * -(-64 // page_size)
        smaller = "no draft model, a smaller" if draft_bytes else "a smaller"
        raise DoesNotFit(
            f"the model does not fit: {plan}. It needs {size_of(need)} at the least: take "
            f"{smaller} model, a narrower --dtype, or fewer slots (--set engine.max_slots=N)"
            + ("" if free.whole_bytes else _BESIDE)
        )
    raise DoesNotFit(
        f"the KV pool does not fit: {plan}. --set kv.pages={fits} with "
        f"--set engine.max_context={fits * page_size} or less would"
    )


def plan_host_pages(plan: MemoryPlan, host_pages: int, free: FreeMemory) -> MemoryPlan:
    """`plan` with so many host pages; -1 takes their fraction of what is `free` in host memory, and
    where that is the device's too, no more pages than lie there.

    Raises DoesNotFit, saying what would.
    """
    left = free.free_bytes
    if free.shared:
        left -= plan.weight_bytes + plan.work_bytes + plan.kv_bytes + plan.draft_bytes
    if host_pages < 0:
        budget = min(left, free.share_bytes, MOST_HOST_BYTES)
        host_pages = _round_down(max(budget, 0) // plan.page_bytes, free.grain)
        host_pages = min(host_pages, plan.num_pages) if free.shared else host_pages
    plan = replace(plan, host_pages=host_pages)
    if plan.host_bytes <= max(left, 0):
        return plan
    fits = max(left, 0) // plan.page_bytes
    raise DoesNotFit(f"the host pages do not fit: {plan}. --set kv.host_pages={fits} would")


def _round_down(count: int, grain: int) -> int:
    step = max(1, (1 << max(count, 1).bit_length() - 1) // grain)
    return count // step * step


def accelerator_memory(free_bytes: int) -> FreeMemory:
    """What may be taken of so much; the rest of it all goes to pages."""
    return FreeMemory(int(free_bytes * DEVICE_FRACTION), 1.0, DEVICE_GRAIN)


def free_memory(device: jax.Device, share: float = 0.0) -> FreeMemory:
    """What this process may still take on `device`; of an accelerator's, no more than `share`,
    where that is not 0."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        limit, used = stats["bytes_limit"], stats["bytes_in_use"]
        return accelerator_memory(min(limit - used, int(limit * (share or 1))))
    whole_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    whole_bytes = min(whole_bytes, _group_bytes()[0])
    beside = len(device.client.local_devices())  # it shares what there is with
    free_bytes = _free_host_bytes() // beside
    return FreeMemory(free_bytes, CPU_FRACTION, CPU_GRAIN, whole_bytes=whole_bytes // beside)


def free_host_memory(device: jax.Device) -> FreeMemory:
    """What this process may still take of host memory beside `device`."""
    if device.platform == "cpu":
        return replace(free_memory(device), shared=True)
    beside = len(device.client.local_devices())
    return FreeMemory(_free_host_bytes() // beside, HOST_FRACTION, DEVICE_GRAIN)


def give_back_memory() -> None:
    """Return what is free to the system, where the allocator can: compiling leaves hundreds of
    megabytes, in pieces that it would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _free_host_bytes() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the kernel could free counts too
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = _group_bytes()
    return min(free, limit - used)


def _group_bytes() -> tuple[int, int]:
    """A container's memory limit, without one no bound, and what it uses."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return 2**62, 0
    return (int(limit) if limit.isdigit() else 2**62), used


def size_of(count: int) -> str:
    """For people, in the largest unit that leaves it a number above one."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
