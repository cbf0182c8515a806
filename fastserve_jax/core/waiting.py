"""Waiting sequences in order of rank. Knows nothing of what a rank means."""

from __future__ import annotations

import heapq

from .sequence import Rank, Sequence

_SLACK = 64  # stale entries tolerated before they are swept out


class WaitingQueue:
    """A heap with lazy deletion: a new rank is a new entry, and the old one is passed over."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []  # ranks are unique, sequences never compared
        self._members: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._members

    def push(self, seq: Sequence) -> None:
        """Add it, or move it to where its rank now stands."""
        if len(self._heap) > 2 * len(self._members) + _SLACK:
            self._members.pop(seq.id, None)
            self._heap = [(member.rank, member) for member in self._members.values()]
            heapq.heapify(self._heap)
        self._members[seq.id] = seq
        heapq.heappush(self._heap, (seq.rank, seq))

    def discard(self, seq: Sequence) -> None:
        self._members.pop(seq.id, None)

    def peek(self) -> Sequence | None:
        heap = self._heap
        while heap:
            rank, seq = heap[0]
            if self._members.get(seq.id) is seq and seq.rank == rank:
                return seq
            heapq.heappop(heap)
        return None

    def pop(self) -> Sequence:
        seq = self.peek()
        assert seq is not None, "nobody waits"
        heapq.heappop(self._heap)
        del self._members[seq.id]
        return seq

    def members(self) -> list[Sequence]:
        """Everybody who waits, in no order."""
        return list(self._members.values())
