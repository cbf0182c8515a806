"""How long outputs are, learned from those that ended: an online histogram of hazards.

Kaplan-Meier: a request counts as at risk in a bin when it leaves it, finished there or passed on;
one that is cancelled or cut off by its limit was at risk as far as it came and says no more.
Counting only those that finished would favour the short ones under any policy that lets them
finish first. Bins of output tokens widen with age; requests are told apart by prompt length, and a
group that has seen little leans on all. Knows tokens, nothing of requests or time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

_SHRINKAGE = 100.0  # requests that a group must have seen to count as much as all together
_PRIOR = 1.0  # requests' worth of the guess made before anything was seen
_REFRESH = 0.05  # share of new endings after which a group's tables are made again
_HALF_LIFE = 4000.0  # endings after which one counts half: lengths drift


def output_edges(longest: int) -> list[int]:
    """Where bins begin: 0, 8, 16, 24, 32, 40, 50, ... a quarter wider each, beyond `longest`."""
    edges = [0]
    while edges[-1] <= longest:
        edges.append(edges[-1] + max(8, edges[-1] // 4))
    return edges


class History:
    """`longest` output and prompt in tokens bound the bins; what exceeds them is in the last."""

    def __init__(self, longest: int) -> None:
        self.edges = output_edges(longest)
        bins = len(self.edges) - 1
        self._prompt_edges = [2.0**i for i in range(4, math.ceil(math.log2(longest)) + 1)]
        groups = len(self._prompt_edges) + 1
        self._ended = [[0.0] * bins for _ in range(groups)]
        self._risked = [[0.0] * bins for _ in range(groups)]
        self._all_ended, self._all_risked = [0.0] * bins, [0.0] * bins
        self._seen = 0  # endings in all
        self._weight = 1.0  # of the next ending; grows, so that older ones fade
        self._made_at = [-1] * groups  # endings seen when the tables were made
        self._left = [[0.0] * bins for _ in range(groups)]
        self._index = [[0.0] * bins for _ in range(groups)]
        last = float(self.edges[-1])
        # Before anything is seen: as if lengths were spread evenly in their logarithm.
        beyond = [math.log(last / max(edge, 1)) for edge in self.edges]
        self._prior = [1.0 - b / a for a, b in pairwise(beyond)]

    def group(self, prompt_tokens: int) -> int:
        """Which history a prompt of that length belongs to."""
        return bisect_right(self._prompt_edges, prompt_tokens)

    def bin(self, output_tokens: int) -> int:
        return min(bisect_right(self.edges, output_tokens), len(self.edges) - 1) - 1

    def record(self, group: int, output_tokens: int, ended: bool) -> None:
        """A request left at that length; `ended` by itself, or cut off."""
        at = self.bin(output_tokens)
        reached = at + 1 if ended else at
        for risked in (self._risked[group], self._all_risked):
            for k in range(reached):
                risked[k] += self._weight
        if ended:
            self._ended[group][at] += self._weight
            self._all_ended[at] += self._weight
        self._seen += 1
        self._weight *= 2.0 ** (1.0 / _HALF_LIFE)
        if self._weight > 1e6:
            self._rescale()

    def left_tokens(self, group: int, output_tokens: int) -> float:
        """Expected output still to come."""
        self._make(group)
        return self._left[group][self.bin(output_tokens)]

    def index_tokens(self, group: int, output_tokens: int) -> float:
        """Gittins: the least, over all ways to stop trying, of tokens spent per request ended."""
        self._make(group)
        return self._index[group][self.bin(output_tokens)]

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
        index = self._index[group]
        for k in range(bins):
            best, spent, alive = math.inf, 0.0, 1.0
            for m in range(k, bins):
                spent += alive * widths[m] * (1.0 - hazards[m] / 2.0)
                alive *= 1.0 - hazards[m]
                if alive < 1.0 and spent / (1.0 - alive) < best:
                    best = spent / (1.0 - alive)
                if alive < 0.01:
                    break
            index[k] = best

    def _hazards(self, group: int) -> list[float]:
        """Of a request that reached a bin, the chance to end there."""
        hazards = []
        weight = self._weight
        for k, prior in enumerate(self._prior):
            known = (self._all_ended[k] / weight + _PRIOR * prior) / (
                self._all_risked[k] / weight + _PRIOR
            )
            own = self._ended[group][k] / weight + _SHRINKAGE * known
            hazards.append(own / (self._risked[group][k] / weight + _SHRINKAGE))
        hazards[-1] = 1.0
        return hazards

    def _rescale(self) -> None:
        for counts in (*self._ended, *self._risked, self._all_ended, self._all_risked):
            for k, count in enumerate(counts):
                counts[k] = count / self._weight
        self._weight = 1.0
