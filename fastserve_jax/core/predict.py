"""How long outputs are, learned from those that ended: an online histogram of hazards.

Kaplan-Meier: a request counts as at risk in a bin when it leaves it, finished there or passed on;
one that is cancelled or cut off by its limit was at risk as far as it came and says no more.
Counting only those that finished, or all only when they are over, would favour the short ones under
any policy that lets them finish first. Bins of output tokens widen with age; requests are told
apart by client and prompt length, and a group that has seen little leans on a larger one. Knows
nothing of requests or time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

_SHRINKAGE = 100.0  # requests that a group must have seen to count as much as all together
_OWN_SHRINKAGE = 30.0  # the same for a client's own, which are more alike
_MOST_OWN = 1024  # clients' histories, by prompt length; later ones share
_PRIOR = 1.0  # requests' worth of the guess made before anything was seen
_PRIOR_TOKENS = 200.0  # that guess: outputs of this mean, each token as likely the last
_REFRESH = 0.05  # share of new endings after which a group's tables are made again
_HALF_LIFE = 4000.0  # endings after which one counts half: lengths drift


def output_edges(longest: int) -> list[int]:
    """Where bins begin: 0, 8, 16, 24, 32, 40, 50, ... a quarter wider each, beyond `longest`."""
    edges = [0]
    while edges[-1] <= longest:
        edges.append(edges[-1] + max(8, edges[-1] // 4))
    return edges


class History:
    """`longest` output and prompt in tokens bound the bins; what exceeds them is in the last.

    `brevity` is what an answer's seconds per token count beside its seconds, for the index: an
    answer of X tokens is worth (1 + brevity * H / X) / (1 + brevity), H the harmonic mean of all
    lengths, hence 1 on average. With 0 all answers are worth the same.
    """

    def __init__(self, longest: int, brevity: float = 0.0) -> None:
        self._brevity = brevity
        self.edges = output_edges(longest)
        self._prompt_edges = [2.0**i for i in range(4, math.ceil(math.log2(longest)) + 1)]
        # By group: of what was seen, and the tables made of it. First those of prompt lengths,
        # then all together, then clients' own; each leans on its parent.
        self._parent: list[int] = []
        self._ended: list[list[float]] = []
        self._risked: list[list[float]] = []
        self._left: list[list[float]] = []
        self._index: list[list[float]] = []
        self._tries: list[list[tuple[float, float]]] = []  # of a new request: tokens, worth ended
        self._made_at: list[int] = []  # endings seen when the tables were made
        self._own: dict[tuple[str, int], int] = {}  # client and prompt group -> group
        self._seen = 0  # endings in all
        self._weight = 1.0  # of the next ending; grows, so that older ones fade
        self._everybody = len(self._prompt_edges) + 1
        for _ in range(self._everybody):
            self._add_group(self._everybody)
        self._add_group(-1)
        self._first_own = len(self._parent)
        # Before anything is seen, age tells nothing: then nobody is displaced for a newcomer.
        self._prior = [1.0 - math.exp((a - b) / _PRIOR_TOKENS) for a, b in pairwise(self.edges)]

    def group(self, prompt_tokens: int, client: str = "") -> int:
        """Which history a prompt of that length belongs to; a client's own, while there is room
        for another."""
        group = bisect_right(self._prompt_edges, prompt_tokens)
        if not client:
            return group
        own = self._own.get((client, group))
        if own is None:
            if len(self._own) == _MOST_OWN:
                return group
            own = self._own[client, group] = len(self._parent)
            self._add_group(group)
        return own

    def _add_group(self, parent: int) -> None:
        bins = len(self.edges) - 1
        self._parent.append(parent)
        self._made_at.append(-1)
        self._tries.append([])
        for tables in (self._ended, self._risked, self._left, self._index):
            tables.append([0.0] * bins)

    def bin(self, output_tokens: int) -> int:
        at = bisect_right(self.edges, output_tokens)
        return at - 1 if at < len(self.edges) else at - 2

    def outlive(self, group: int, output_tokens: int, counted: int = 0) -> int:
        """A request that lives has come so far. Returns how many bins it is counted in by now;
        `counted` is what this returned before."""
        at = self.bin(output_tokens)
        self._risk(group, counted, at)
        return max(at, counted)

    def record(self, group: int, output_tokens: int, ended: bool, counted: int = 0) -> None:
        """A request left at that length; `ended` by itself, or cut off. It is counted already in
        so many bins, as `outlive` says."""
        at = self.bin(output_tokens)
        self._risk(group, counted, at + 1 if ended else at)
        while ended and group >= 0:
            self._ended[group][at] += self._weight
            group = self._parent[group]
        self._seen += 1
        self._weight *= 2.0 ** (1.0 / _HALF_LIFE)
        if self._weight > 1e6:
            self._rescale()

    def _risk(self, group: int, start: int, stop: int) -> None:
        """At risk in those bins, and in the group's parents'."""
        while start < stop and group >= 0:
            risked = self._risked[group]
            for k in range(start, stop):
                risked[k] += self._weight
            group = self._parent[group]

    def left_tokens(self, group: int, output_tokens: int) -> float:
        """Expected output still to come."""
        return self.expect(group, output_tokens)[0]

    def expect(self, group: int, output_tokens: int) -> tuple[float, float, int]:
        """Output tokens still to come; the Gittins index: the least, over all ways to stop trying,
        of tokens spent per worth ended; and at how many tokens either is another."""
        self._make(group)
        at = self.bin(output_tokens)
        return self._left[group][at], self._index[group][at], self.edges[at + 1]

    def new_index_tokens(self, group: int, ahead_tokens: float) -> float:
        """The index of a request that has yet to do work of `ahead_tokens` before its first."""
        self._make(group)
        return min((ahead_tokens + spent) / worth for spent, worth in self._tries[group])

    def _make(self, group: int) -> None:
        made = self._made_at[group]
        if made >= 0 and self._seen - made < max(8.0, min(64.0, _REFRESH * self._seen)):
            return
        self._made_at[group] = self._seen
        hazards = self._hazards(group)
        bins = len(hazards)
        widths = [b - a for a, b in pairwise(self.edges)]
        left = self._left[group]
        after = 0.0
        for k in range(bins - 1, -1, -1):
            spent = widths[k] * (1.0 - hazards[k] / 2.0)
            after = left[k] = spent + (1.0 - hazards[k]) * after
        index, worths = self._index[group], self._worths()
        for k in range(bins):
            tries = []
            spent, worth, alive = 0.0, 0.0, 1.0
            for m in range(k, bins):
                spent += alive * widths[m] * (1.0 - hazards[m] / 2.0)
                worth += alive * hazards[m] * worths[m]
                alive *= 1.0 - hazards[m]
                if worth > 0.0:
                    tries.append((spent, worth))
                if alive < 0.01:
                    break
            index[k] = min(spent / worth for spent, worth in tries)
            if k == 0:
                self._tries[group] = tries

    def _worths(self) -> list[float]:
        """Of an answer that ends in a bin."""
        middles = [(a + b) / 2.0 for a, b in pairwise(self.edges)]
        alive, inverse = 1.0, 0.0
        for hazard, middle in zip(self._hazards(self._everybody), middles, strict=True):
            inverse += alive * hazard / middle
            alive *= 1.0 - hazard
        brevity = self._brevity
        return [(1.0 + brevity / (inverse * middle)) / (1.0 + brevity) for middle in middles]

    def _hazards(self, group: int) -> list[float]:
        """Of a request that reached a bin, the chance to end there: what the group saw, leaning on
        its parent, which leans on its own."""
        parent = self._parent[group]
        known = self._prior if parent < 0 else self._hazards(parent)
        leaning = (
            _PRIOR if parent < 0 else _SHRINKAGE if group < self._first_own else _OWN_SHRINKAGE
        )
        weight, ended, risked = self._weight, self._ended[group], self._risked[group]
        hazards = [
            (ended[k] / weight + leaning * prior) / (risked[k] / weight + leaning)
            for k, prior in enumerate(known)
        ]
        hazards[-1] = 1.0
        return hazards

    def _rescale(self) -> None:
        for counts in (*self._ended, *self._risked):
            for k, count in enumerate(counts):
                counts[k] = count / self._weight
        self._weight = 1.0
