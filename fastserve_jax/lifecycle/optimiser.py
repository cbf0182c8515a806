"""How parameters follow their gradients: AdamW with what is usual around it, by optax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optax

from fastserve_jax.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, slots=True)
class Optimiser:
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # how it falls after the warm-up, over the steps that are left
    warmup_steps: int = 100  # in which it rises from nothing
    end: float = 0.1  # of it, what a step behind the last would have
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # length of all gradients together; 0: as they are

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"no schedule {self.schedule}: there are {', '.join(SCHEDULES)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"a learning rate of {self.learning_rate} teaches nothing")
        for name in ("warmup_steps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optimiser.{name} is at least 0, not {getattr(self, name)}")


def schedule(of: Optimiser, steps: int) -> optax.Schedule:
    """The learning rate of each step."""
    warmup, peak = min(of.warmup_steps, max(0, steps - 1)), of.learning_rate
    left = max(1, steps - warmup)
    falling = {
        "cosine": optax.cosine_decay_schedule(peak, left, of.end),
        "linear": optax.linear_schedule(peak, of.end * peak, left),
        "constant": optax.constant_schedule(peak),
    }[of.schedule]
    if not warmup:
        return falling
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, falling], [warmup])


def make(of: Optimiser, steps: int) -> optax.GradientTransformation:
    adamw = optax.adamw(
        schedule(of, steps), of.beta1, of.beta2, of.eps, weight_decay=of.weight_decay, mask=_decays
    )
    return optax.chain(optax.clip_by_global_norm(of.clip), adamw) if of.clip else adamw


def _decays(arrays: Mapping[str, Any]) -> dict[str, bool]:
    return {name: array.ndim > 1 for name, array in arrays.items()}
