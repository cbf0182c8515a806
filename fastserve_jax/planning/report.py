"""A plan as a person reads it before renting anything, and as JSON."""

from __future__ import annotations

from collections import Counter

import msgspec
from rich.console import Console
from rich.table import Table

from fastserve_jax.chips import Rates
from fastserve_jax.runtime.memory import size_of

from .plan import Planned


def as_json(planned: list[Planned]) -> str:
    """A list with an object for each compiled step."""
    return msgspec.json.format(msgspec.json.encode(planned), indent=2).decode()


def show(planned: list[Planned], rates: Rates, console: Console) -> None:
    first = planned[0]
    axes = {axis: count for axis, count in first.mesh.items() if count > 1 or axis != "expert"}
    mesh = " x ".join(f"{count} {axis}" for axis, count in axes.items())
    lines = [f"[bold]{first.model}[/] on {first.chip}: {_devices(first)}, {mesh}"]
    for step in planned:
        lines.append(_memory(step))
        if not step.fits and step.why_not:
            lines.append(f"  {step.why_not}")
    lines.append(
        f"pages: {first.kv_pages:,} of {first.page_size} tokens, "
        f"{first.kv_pages * first.page_size:,} tokens in all: {first.max_concurrent} requests of "
        f"{first.context:,}; {first.slots} in one step"
    )
    lines += [_compiled(step) for step in planned if step.kernels is not None]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print()
    console.print(_estimates(planned))
    console.print()
    console.print(
        "An estimate, and an upper bound: the bytes of weights and of whole contexts (as far as "
        f"there are pages for them) over the memory's {rates.bandwidth / 1e9:,.0f} GB/s or the "
        f"operations over {rates.operations / 1e12:,.0f} T/s, whichever takes longer, and then "
        f"the sums over devices at the links' {rates.link / 1e9:,.0f} GB/s. Nothing was run.",
        style="dim",
        soft_wrap=True,
        highlight=False,
    )


def _devices(step: Planned) -> str:
    return "1 device" if step.devices == 1 else f"{step.devices} devices"


def _memory(step: Planned) -> str:
    if step.peak_bytes is None:
        return f"{step.program}: [red]does not fit[/] in {size_of(step.memory_bytes)}"
    spare = step.memory_bytes - step.peak_bytes
    verdict = (
        f"[green]fits[/], {size_of(spare)} to spare"
        if step.fits
        else f"[red]does not fit[/], {size_of(-spare)} too much"
    )
    work = "" if step.temp_bytes is None else f", work {size_of(step.temp_bytes)}"
    return (
        f"{step.program}: {verdict}. Of {size_of(step.memory_bytes)} on each device: weights "
        f"{size_of(step.weight_bytes)}, pages {size_of(step.kv_cache_bytes)}{work}"
    )


def _compiled(step: Planned) -> str:
    counts = Counter(step.collectives) + Counter(step.drawing_collectives)
    joined = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    whole = "all" if step.alias_bytes == step.kv_cache_bytes else f"{step.alias_bytes:,} bytes"
    return (
        f"{step.program}: compiled in {step.compile_s:.1f} s; {step.kernels} kernels; "
        f"{joined or 'no collectives'}; pages updated in place: {whole}"
    )


def _estimates(planned: list[Planned]) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("step", "sequences", "tokens", "read", "operations", "at the least", "tokens/s")
    for name in columns:
        table.add_column(name, justify="left" if name == "step" else "right")
    for step in planned:
        for estimate in step.step:
            table.add_row(
                step.program,
                f"{estimate.batch:,}",
                f"{estimate.tokens_per_s * estimate.floor_s:,.0f}",
                size_of(estimate.bytes_read),
                f"{estimate.operations / 1e9:,.0f} G",
                f"{estimate.floor_s * 1e3:,.2f} ms",
                f"{estimate.tokens_per_s:,.0f}",
            )
    return table
