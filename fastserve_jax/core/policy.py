"""Every policy by its name."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from .adaptive import Adaptive
from .cost import CostModel
from .mlfq import SkipJoinMLFQ
from .ordering import FirstComeFirstServed, Lengths, Policy, RunToCompletion, ShortestFirst
from .sequence import Limits

__all__ = ["ORACLES", "POLICIES", "Lengths", "Policy", "make_policy"]

_Make = Callable[[Limits, CostModel, Lengths | None], Policy]
_MAKERS: dict[str, _Make] = {
    "run-to-completion": lambda limits, cost, lengths: RunToCompletion(limits),
    "fcfs": lambda limits, cost, lengths: FirstComeFirstServed(),
    "mlfq-naive": lambda limits, cost, lengths: SkipJoinMLFQ(limits, cost, skip_join=False),
    "mlfq": lambda limits, cost, lengths: SkipJoinMLFQ(limits, cost),
    "sjf-oracle": lambda limits, cost, lengths: ShortestFirst(limits, cost, lengths, left=False),
    "srpt-oracle": lambda limits, cost, lengths: ShortestFirst(limits, cost, lengths, left=True),
    "srpt-predicted": lambda limits, cost, lengths: ShortestFirst(limits, cost, lengths, left=True),
    "adaptive": lambda limits, cost, lengths: Adaptive(limits, cost, lengths=lengths),
}
POLICIES = tuple(_MAKERS)
ORACLES = ("sjf-oracle", "srpt-oracle")  # they need to be told how long outputs will be


def make_policy(
    name: str, limits: Limits, cost: CostModel, lengths: Lengths | None = None
) -> Policy:
    """The policy called `name`; raises ConfigError for an unknown one, or for an oracle where
    nobody knows the lengths."""
    make = _MAKERS.get(name)
    if make is None:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    if name in ORACLES and lengths is None:
        raise ConfigError(
            f"policy {name!r} knows every output's length in advance, which only a simulation can "
            "tell it (fastserve simulate): serve with adaptive or srpt-predicted"
        )
    return make(limits, cost, lengths)
