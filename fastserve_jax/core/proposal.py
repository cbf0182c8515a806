"""What a draft model said comes next in one sequence, how often it is right, and what asking costs.

A draft model costs time whether right or not, and is judged only when asked: so a sequence that
is not worth asking for drifts back to what all are like, and that to where it began, to be tried
again. Knows tokens and seconds only: when asking pays is not its.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_EXPECTED = 0.6  # of its tokens right, before any was judged
_GAIN = 0.125  # of one more token, on how often it is right
_GAIN_OF_ALL = 0.02
_DRIFT = 0.002  # towards the others, with each look that asks for nothing
_DRIFT_OF_ALL = 0.0005
_GAIN_OF_COST = 0.1
_MOST_SURPRISE = 3.0  # times longer than expected; what is more is a pause of the machine


class DraftOdds:
    """How many of its tokens are right, a moving average over all texts."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = _EXPECTED

    def forget(self) -> None:
        """A little, with each plan."""
        self.right += _DRIFT_OF_ALL * (_EXPECTED - self.right)


class Proposal:
    """For `tokens`, a list that only ever grows at its end."""

    __slots__ = ("_judged", "_known", "_odds", "_right", "_tokens", "_wrong", "behind", "proposed")

    def __init__(self, tokens: list[int], odds: DraftOdds) -> None:
        self._tokens, self._odds = tokens, odds
        self._right = odds.right
        self._known = 0  # tokens there were when it was asked
        self.proposed: tuple[int, ...] = ()
        self._judged = 0  # of what it said then, found right
        self._wrong = False  # the next one was not
        self.behind = 0  # known tokens that it had not run then

    def hear(self, known: int, proposed: tuple[int, ...], behind: int) -> None:
        """It was asked when `known` tokens were known."""
        self._known, self.proposed, self.behind = known, proposed, behind
        self._judged, self._wrong = 0, False

    def follow(self) -> None:
        """Judge what can be judged by now."""
        tokens, proposed = self._tokens, self.proposed
        while not self._wrong and self._judged < len(proposed):
            at = self._known + self._judged
            if at >= len(tokens):
                return
            is_right = tokens[at] == proposed[self._judged]
            self._right += _GAIN * (is_right - self._right)
            self._odds.right += _GAIN_OF_ALL * (is_right - self._odds.right)
            self._judged += is_right
            self._wrong = not is_right

    @property
    def agreed(self) -> int:
        """Tokens in front that it has run, or would have, as they came to be."""
        return self._known + self._judged

    @property
    def lacking(self) -> int:
        """Tokens that it must run to go on from here, unless another took its place."""
        return max(1, self.behind + len(self._tokens) - self.agreed)

    def lose(self) -> None:
        """All that it ran for this sequence."""
        self.hear(0, (), 0)

    @property
    def is_fresh(self) -> bool:
        """Whether it stands behind all that is known now."""
        return bool(self.proposed) and self._known == len(self._tokens)

    def drift(self) -> None:
        """A look at what might be asked."""
        self._right += _DRIFT * (self._odds.right - self._right)

    def chances(self, count: int) -> list[float]:
        """How likely its first token is right, its first two are, and so on up to `count`."""
        return [self._right**level for level in range(1, count + 1)]


@dataclass(slots=True)
class DraftCost:
    """In seconds: a run with one token, and each token more in a run."""

    run_s: float
    token_s: float = 0.0

    def ask_s(self, runs: int, tokens: int) -> float:
        return self.run_s * runs + self.token_s * max(tokens - runs, 0)

    def observe(self, runs: int, tokens: int, elapsed_s: float) -> None:
        """Correct both terms in proportion to their share of what was expected."""
        expected_s = self.ask_s(runs, tokens)
        if not runs or expected_s <= 0.0:
            return
        miss = min(elapsed_s / expected_s, _MOST_SURPRISE) - 1.0
        step = _GAIN_OF_COST * miss / expected_s
        runs_s = self.run_s * runs
        self.run_s *= 1.0 + step * runs_s
        self.token_s *= 1.0 + step * (expected_s - runs_s)

    def copy(self) -> DraftCost:
        return replace(self)
