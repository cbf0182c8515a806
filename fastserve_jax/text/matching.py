"""Patterns that find any of many words: a vocabulary may have thousands of control tokens, and
trying each at every letter of a long text would take minutes."""

from __future__ import annotations

import re
from collections.abc import Iterable

_Trie = dict[str, "_Trie"]
_END = ""


def any_of(words: Iterable[str]) -> str:
    """A pattern for the longest of `words` that stands here. No words: it never matches."""
    trie = _trie(words)
    return _pattern(trie) if trie else "(?!)"


def first_of(words: Iterable[str]) -> str:
    """A pattern for the first letter of any of `words`, where the whole word stands."""
    trie = _trie(words)
    starts = [f"{re.escape(letter)}(?={_pattern(rest)})" for letter, rest in trie.items()]
    return "|".join(starts) or "(?!)"


def _trie(words: Iterable[str]) -> _Trie:
    trie: _Trie = {}
    for word in words:
        node = trie
        for letter in word:
            node = node.setdefault(letter, {})
        node[_END] = {}
    return trie


def _pattern(node: _Trie) -> str:
    branches = [
        re.escape(letter) + _pattern(rest) for letter, rest in node.items() if letter != _END
    ]
    if len(branches) == 1 and _END not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if _END in node else "") if branches else ""
