"""Which of many replicas a request goes to, by what each was given before; the same in a fleet and
in simulation.

    prefix       where most of its beginning was computed, unless others are so much less busy that
                 computing it again is sooner
    least        to the less busy of two drawn by lot (Mitzenmacher, "The power of two choices in
                 randomized load balancing", 2001)
    round-robin  in turns

A replica's load is the tokens that it was given and has not ended. A decision costs the same among
a thousand replicas as among three. Knows names of beginnings, no texts; randomness is given.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

POLICIES = ("prefix", "least", "round-robin")
MOST_BEGINNINGS = 1 << 18  # that are remembered; a replica has forgotten older ones, too
_MOST_HOMES = 4  # replicas that are remembered for one
_DRAWN = 2


type Draw = Callable[[Sequence[str], int], Sequence[str]]  # so many different ones, by lot


class Router:
    """`tokens` of a request are its prompt's and what it is expected to produce."""

    def __init__(self, policy: str, draw: Draw) -> None:
        assert policy in POLICIES, policy
        self._policy, self._draw = policy, draw
        self._replicas: list[str] = []
        self._loads: dict[str, float] = {}
        self._homes: OrderedDict[Hashable, tuple[str, ...]] = OrderedDict()
        self._turn = 0

    def load(self, replica: str) -> float:
        return self._loads[replica]

    def add(self, replica: str) -> None:
        """From now on. A name is used once: what is remembered of it is gone with who had it."""
        assert replica not in self._loads, f"{replica} is there"
        self._replicas.append(replica)
        self._loads[replica] = 0.0

    def remove(self, replica: str) -> None:
        """Takes no new requests; those that it has may still end. Unknown ones are ignored."""
        if replica in self._loads:
            self._replicas.remove(replica)
            del self._loads[replica]

    def route(
        self,
        beginnings: Sequence[Hashable],
        tokens: float,
        block_tokens: float,
        without: Sequence[str] = (),
    ) -> str | None:
        """The replica for a request whose prompt has such `beginnings`, each `block_tokens` longer
        than the one before it; None where there is none but those `without`. The caller says when
        it ends."""
        allowed = self._replicas
        if without:
            allowed = [replica for replica in allowed if replica not in without]
        if not allowed:
            return None
        if self._policy == "round-robin":
            chosen = allowed[self._turn % len(allowed)]
            self._turn += 1
        else:
            chosen = self._nearest(allowed, beginnings, block_tokens)
        self._loads[chosen] += tokens
        if self._policy == "prefix":
            self._remember(beginnings, chosen)
        return chosen

    def _nearest(
        self, allowed: list[str], beginnings: Sequence[Hashable], block_tokens: float
    ) -> str:
        known = self._known(beginnings) if self._policy == "prefix" else {}
        there = self._loads if len(allowed) == len(self._replicas) else allowed
        known = {replica: blocks for replica, blocks in known.items() if replica in there}
        drawn = allowed if len(allowed) <= _DRAWN else self._draw(allowed, _DRAWN)
        loads = self._loads
        return min(
            (*known, *drawn),
            key=lambda replica: loads[replica] - known.get(replica, 0) * block_tokens,
        )

    def _known(self, beginnings: Sequence[Hashable]) -> dict[str, int]:
        """How many of the beginnings each replica has computed, of those that were remembered."""
        known: dict[str, int] = {}
        for count, name in enumerate(beginnings, 1):
            homes = self._homes.get(name)
            if homes is None:
                break
            for replica in homes:
                known[replica] = count
        return known

    def _remember(self, beginnings: Sequence[Hashable], replica: str) -> None:
        homes = self._homes
        for name in beginnings:
            others = [home for home in homes.pop(name, ()) if home != replica]
            homes[name] = (replica, *others[: _MOST_HOMES - 1])
        while len(homes) > MOST_BEGINNINGS:
            homes.popitem(last=False)

    def ended(self, replica: str, tokens: float) -> None:
        """A request that was routed there, with what was said of it then."""
        if replica in self._loads:
            self._loads[replica] = max(0.0, self._loads[replica] - tokens)
