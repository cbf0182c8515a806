"""How much is read to make a model smaller, and to say what that did to it."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Effort:
    """Counts of rows and of rounds.

    Parameters
    ----------
    calibrate
        Rows of DATA that are looked at.
    measure
        Rows that perplexity is of.
    rounds
        Times that each model decodes, by turns; 0: it is not said how fast they are.
    """

    calibrate: int = 64
    measure: int = 64
    rounds: int = 5

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name, least in (("calibrate", 1), ("measure", 1), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is at least {least}, not {getattr(self, name)}")
