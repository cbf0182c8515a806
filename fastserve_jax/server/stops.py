"""Stop strings over streamed text, wherever the pieces are cut. Pure."""

from __future__ import annotations


class StopMatcher:
    """Lets text through until a stop string is complete, never a part of one before that is known.

    The stop string that is complete first wins, and of those complete at the same character the
    one that began first; so the cut does not depend on how the text arrives.
    """

    def __init__(self, stops: tuple[str, ...], keep: bool = False) -> None:
        assert all(stops)
        self._stops = stops
        self._keep = keep
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """What may be shown now. Nothing more is to be pushed once `matched`."""
        assert not self.matched
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            self.matched = True
            self._held = ""
            end, start = min(ends)
            return text[:end] if self._keep else text[:start]
        keep = self._unsure(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
