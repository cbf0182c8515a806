"""For which platform programs are traced: the one that is here, or a chip they are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Target:
    platform: str  # "cpu", "gpu" or "tpu"
    has_tma: bool = False  # a GPU's copies of whole tiles: Hopper and later
    has_wgmma: bool = False  # a GPU's products of four warps as one: Hopper
    has_int8: bool = True  # a TPU's products of integers: v5 and later

    @property
    def lanes(self) -> int:
        """To a multiple of how many elements a row of a page is filled up; see KVLayout."""
        return 128 if self.platform == "tpu" else 1


_given: ContextVar[Target | None] = ContextVar("target", default=None)


def target() -> Target:
    given = _given.get()
    if given is not None:
        return given
    platform, device = jax.default_backend(), jax.devices()[0]
    if platform == "gpu":
        capability = float(device.compute_capability)
        return Target(platform, has_tma=capability >= 9, has_wgmma=9 <= capability < 10)
    return Target(platform, has_int8="v4" not in device.device_kind)


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """What is traced meanwhile is for `target`, which need not be here."""
    token = _given.set(target)
    try:
        yield
    finally:
        _given.reset(token)
