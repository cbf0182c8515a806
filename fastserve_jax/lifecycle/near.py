"""Documents that are nearly the same as one before: their word 5-grams are compared by MinHash
(Broder, "On the resemblance and containment of documents", 1997), and candidates found by locality
sensitive hashing, as Lee et al. ("Deduplicating training data", 2021) do.

A kilobyte or two is kept for each document. Knows words, no files.
"""

from __future__ import annotations

from typing import Any

_GRAM = 5  # words
_HASHES = 128  # the estimate's deviation is .04 at the most


class Near:
    def __init__(self, least: float) -> None:
        """`least` is the Jaccard similarity from which two are one."""
        from datasketch import MinHashLSH

        self._least = least
        self._known: dict[int, tuple[Any, str]] = {}
        # Buckets for a little less, so that what is just alike enough is rarely missed.
        self._index = MinHashLSH(threshold=max(0.1, least - 0.15), num_perm=_HASHES)

    def has(self, plain: str, label: str) -> bool:
        """Whether there was one of the same label nearly like it; if not, it is remembered. `plain`
        is words apart by spaces."""
        from datasketch import MinHash

        words = plain.split()
        grams = {" ".join(words[at : at + _GRAM]) for at in range(max(1, len(words) - _GRAM + 1))}
        mark = MinHash(_HASHES)
        mark.update_batch([gram.encode("utf-8", "surrogatepass") for gram in sorted(grams)])
        for number in self._index.query(mark):
            other, its_label = self._known[number]
            if its_label == label and mark.jaccard(other) >= self._least:
                return True
        number = len(self._known)
        self._known[number] = mark, label
        self._index.insert(number, mark)
        return False
