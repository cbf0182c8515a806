"""A plan as a person reads it before renting anything, and as JSON."""

from __future__ import annotations

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
    mesh = " x ".join(f"{count} {axis}" for axis, count in first.mesh.items())
    console.print(f"[bold]{first.model}[/] on {first.chip}: {first.devices} devices, {mesh}")
    for step in planned:
        console.print(_memory(step))
        if not step.fits and step.why_not:
            console.print(f"  {step.why_not}")
    console.print(
        f"pages: {first.kv_pages:,} of {first.page_size} tokens, "
        f"{first.kv_pages * first.page_size:,} tokens in all: {first.max_concurrent} requests of "
        f"{first.context:,}; {first.slots} in one step"
    )
    for step in planned:
        if step.kernels is not None:
            console.print(_compiled(step))
    console.print(_estimates(planned, rates))
    console.print(
        "An estimate, and an upper bound: the bytes of weights and of whole contexts over the "
        f"memory's {rates.bandwidth / 1e9:,.0f} GB/s or the operations over {_peak(rates)}, "
        "whichever takes longer, and the sums over devices at the links' "
        f"{rates.link / 1e9:,.0f} GB/s. Nothing was run.",
        style="dim",
    )


def _peak(rates: Rates) -> str:
    return f"{rates.operations / 1e12:,.0f} T/s"


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
    joined = ", ".join(f"{count} {kind}" for kind, count in sorted(step.collectives.items()))
    whole = "all" if step.alias_bytes == step.kv_cache_bytes else f"{step.alias_bytes:,} bytes"
    return (
        f"{step.program}: compiled in {step.compile_s:.1f} s; {step.kernels} kernels; "
        f"{joined or 'no collectives'}; pages updated in place: {whole}"
    )


def _estimates(planned: list[Planned], rates: Rates) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("step", "sequences", "tokens", "at the least", "tokens/s at the most"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for step in planned:
        for estimate in step.step:
            tokens = round(estimate.tokens_per_s * estimate.floor_s)
            row = (estimate.batch, tokens, f"{estimate.floor_s * 1e3:,.2f} ms")
            table.add_row(step.program, *map(str, row), f"{estimate.tokens_per_s:,.0f}")
    if planned[0].step:
        last = planned[0]
        table.caption = (
            f"a decode step at {last.slots} sequences: {size_of(last.bytes_read)} read and "
            f"{last.operations / 1e9:,.0f} G operations on each device"
        )
    return table
