"""What a sequence's own text says comes next: guesses without a second model.

Where the last three tokens, or else two, stood before, what followed then is expected now, and
followed on as long as it is right (prompt lookup; Saxena 2023, Yang et al. 2023). A token costs a
few dictionary accesses, whatever the length. Knows tokens only: when a guess pays is not its.
"""

from __future__ import annotations

_REMEMBERED = 4096  # positions; as many again before them are forgotten at once
_SHIFT = 21  # bits of a token
_PAIR, _TRIPLE = (1 << 2 * _SHIFT) - 1, (1 << 3 * _SHIFT) - 1
_GAIN = 0.125  # of one more token, on how often guesses are right
_GAIN_OF_ALL = 0.01


class Odds:
    """How many guesses are right, moving averages over all texts, by how many were right in a row
    before: what a new text is expected to be like."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = [0.25, 0.4, 0.55, 0.7, 0.8]  # before any was judged


class Lookup:
    """Over `tokens`, a list that only ever grows at its end. Guesses at tokens from the one
    numbered `given` on are judged by what came, and `odds` learn of it."""

    __slots__ = (
        *("_at", "_given", "_last_pairs", "_last_triples", "_odds", "_pair", "_pairs", "_right"),
        *("_seen", "_streak", "_tokens", "_triple", "_triples"),
    )

    def __init__(self, tokens: list[int], given: int, odds: Odds) -> None:
        self._tokens, self._given = tokens, given
        self._seen = 0  # tokens taken in
        self._at = -1  # position of the token that is expected next; -1: none is
        self._streak = 0  # right ones in a row up to here
        self._odds = odds
        self._right = list(odds.right)
        self._pair = self._triple = 0  # the last tokens taken in, as one number each
        # The last tokens before each position, and the latest such position.
        self._pairs: dict[int, int] = {}
        self._triples: dict[int, int] = {}
        self._last_pairs: dict[int, int] = {}
        self._last_triples: dict[int, int] = {}

    def follow(self, most: int) -> int:
        """Take in what has been added since, up to `most` tokens; returns how many those were."""
        tokens, start = self._tokens, self._seen
        end = min(len(tokens), start + most)
        pair, triple, given = self._pair, self._triple, self._given
        for position in range(start, end):
            token = tokens[position]
            if self._at >= 0 and position >= given:
                self._judge(token)
            if position > 1:
                self._pairs[pair] = position
            if position > 2:
                self._triples[triple] = position
            triple = (triple << _SHIFT | token) & _TRIPLE
            pair = triple & _PAIR
            if self._at < 0 and position >= given - 1:
                self._at = self._find(pair, triple)
            if len(self._pairs) >= _REMEMBERED:
                self._forget()
        self._pair, self._triple, self._seen = pair, triple, end
        return end - start

    def _judge(self, token: int) -> None:
        own, all_texts = self._right, self._odds.right
        level = min(self._streak, len(own) - 1)
        is_right = self._tokens[self._at] == token
        own[level] += _GAIN * (is_right - own[level])
        all_texts[level] += _GAIN_OF_ALL * (is_right - all_texts[level])
        if is_right:
            self._at += 1
            self._streak += 1
        else:
            self._at, self._streak = -1, 0

    def _find(self, pair: int, triple: int) -> int:
        for known, key in (
            (self._triples, triple),
            (self._last_triples, triple),
            (self._pairs, pair),
            (self._last_pairs, pair),
        ):
            if key in known:
                return known[key]
        return -1

    def _forget(self) -> None:
        self._last_pairs, self._last_triples = self._pairs, self._triples
        self._pairs, self._triples = {}, {}

    @property
    def expects(self) -> bool:
        """Whether there is something to guess, all tokens taken in."""
        return self._at >= 0 and self._seen == len(self._tokens)

    def guess(self, count: int) -> tuple[int, ...]:
        """The next `count` tokens; what repeats up to the end is taken to repeat further."""
        assert self.expects
        tokens, at, known = self._tokens, self._at, len(self._tokens)
        found = tokens[at : at + count]
        period = known - at
        while len(found) < count:
            found.append(found[len(found) - period])
        return tuple(found)

    def chances(self, count: int) -> list[float]:
        """How likely the first guess is right, the first two are, and so on up to `count`."""
        right, chance, chances = self._right, 1.0, []
        last = len(right) - 1
        for level in range(self._streak, self._streak + count):
            chance *= right[level if level < last else last]
            chances.append(chance)
        return chances
