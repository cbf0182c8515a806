"""Keeps what tracing made of each program, so that a second start traces nothing.

StableHLO as jax.export writes it. What is compiled always comes from the kept form, at the first
start too: so the second one finds the compiled program in XLA's cache. Knows no particular program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax import export

from pallas_kernels import cpu, prepare

from . import kept
from .shapes import Program


def lower_kept(program: Program, folder: Path, facts: object) -> jax.stages.Lowered:
    """Like `program.lower()`. `facts` are what its function hangs on beside code and arguments.

    What cannot be exported, a result in another memory for one, is traced every time.
    """
    if program.placed is not None:
        return program.lower()
    leaves, tree = jax.tree.flatten(program.args)
    platform = jax.default_backend()
    path = folder / kept.name_of(program.name, facts, str(tree), leaves, platform, _settings())
    data = kept.read(path)
    if data is None:
        try:
            data = _trace(program, leaves, tree)
        except (NotImplementedError, ValueError):  # a custom call that promises nothing
            return program.lower()
        kept.write(path, data)
    prepare()
    exported = export.deserialize(bytearray(data))

    def call(*args: Any) -> Any:
        return exported.call(*jax.tree.leaves(args))  # type: ignore[no-untyped-call]

    call.__name__ = program.name.partition("[")[0]  # what profiles and the cache's files show
    return jax.jit(call, donate_argnums=program.donated).lower(*program.args)


def _trace(program: Program, leaves: list[Any], tree: Any) -> bytes:
    """Its arguments flat: a file holds no classes of ours but those that come out."""

    def flat(*leaves: Any) -> Any:
        return program.function(*jax.tree.unflatten(tree, leaves))

    # Ours are as stable as this code, which names the file.
    ours = [export.DisabledSafetyCheck.custom_call(name) for name in cpu.FUNCTIONS]
    return bytes(export.export(jax.jit(flat), disabled_checks=ours)(*leaves).serialize())


def _settings() -> list[tuple[str, str]]:
    """What a user may have set that changes a trace."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")
    return [(name, str(getattr(jax.config, name))) for name in names]
