"""A model that learns what a larger one expects, not only what the text says.

    alpha T^2 KL(teacher || student, both at temperature T) + (1 - alpha) cross-entropy

as in Hinton et al., "Distilling the knowledge in a neural network", 2015, section 2: gradients of
the soft part go with 1 / T^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fastserve_jax.errors import ConfigError

from .losses import Arrays, Loss, Model, cross_entropy


@dataclass(frozen=True, slots=True)
class Distil:
    teacher: str = ""  # a model of the same vocabulary; "": there is none
    temperature: float = 2.0
    alpha: float = 0.5  # of the loss, what the teacher expects

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"distil.temperature is more than 0, not {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"distil.alpha is from 0 to 1, not {self.alpha}")


def distilled(
    student: Model, teacher: Model, arrays: Arrays, taught: Arrays, batch: Arrays, of: Distil
) -> Loss:
    """Like Model.loss; `taught` are the teacher's arrays, which nothing changes."""
    logits, target, counts = student.expected(arrays, batch)
    hard, told = cross_entropy(logits, target, counts)
    wise = jax.lax.stop_gradient(teacher.expected(taught, batch)[0])
    own, wise = (jax.nn.log_softmax(x / of.temperature) for x in (logits, wise))
    apart = jnp.sum(jnp.exp(wise) * (wise - own), axis=-1)
    soft = of.temperature**2 * jnp.sum(jnp.where(counts, apart, 0))
    return of.alpha * soft + (1 - of.alpha) * hard, told
