"""`fastserve compress`: what a person may say to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fastserve_jax.weights.catalogue import cache_folder

from .effort import Effort

app = App(
    name="compress",
    help="Make models smaller. What is left makes up for it on DATA, a prepared folder: its rows "
    "for training are looked at, those held out are measured with, before and after.",
)

_USUAL = Effort()
_Effort = Annotated[Effort, Parameter(name="*")]
_Keep = Annotated[
    list[str] | None,
    Parameter(negative=(), help="Matrices that stay as they are: layers.*.mlp.down; repeatable."),
]


@app.command(name="quantise")
def run_quantise(
    model: str,
    data: Path,
    /,
    *,
    to: str,
    name: str,
    method: str = "gptq",
    group: int = 32,
    keep: _Keep = None,
    effort: _Effort = _USUAL,
) -> None:
    """Register MODEL's matrices in fewer bits as NAME.

    Parameters
    ----------
    to
        int8, int4 or fp8: of weights; w8a8: int8, activations too.
    method
        gptq: each number makes up for the one before; awq: large inputs are made small first;
        nearest: neither.
    group
        Inputs that share a scale, in int4.
    """
    from fastserve_jax.lifecycle.compress import commands
    from fastserve_jax.lifecycle.compress.quantise import Quantising

    asked = Quantising(to, method, group, tuple(keep or ()))
    commands.run_quantise(model, data, name, asked, effort, cache_folder())


@app.command(name="prune")
def run_prune(
    model: str,
    data: Path,
    /,
    *,
    pattern: str,
    name: str,
    share: float = 0.5,
    heads: float = 0.0,
    method: str = "second-order",
    effort: _Effort = _USUAL,
) -> None:
    """Register MODEL with less in it as NAME; `fastserve train` with it as `base` and
    `prune.keep` = true teaches what is left.

    Parameters
    ----------
    pattern
        structured: neurons and heads are gone; unstructured, 2:4: numbers become zero.
    share
        What goes, of neurons or of numbers.
    heads
        What goes of KV heads, with those that read them.
    method
        Of zeros: second-order, or magnitude, which moves nothing else.
    """
    from fastserve_jax.lifecycle.compress import commands
    from fastserve_jax.lifecycle.compress.prune import Pruning

    asked = Pruning(pattern, share, heads, method)
    commands.run_prune(model, data, name, asked, effort, cache_folder())
