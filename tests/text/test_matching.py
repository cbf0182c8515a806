"""Patterns for many words, against trying every word."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.text.matching import any_of, first_of

_TEXT = st.text("ab<|.", max_size=12)
_WORDS = st.lists(st.text("ab<|.", min_size=1, max_size=4), max_size=6)


@given(words=_WORDS, text=_TEXT)
def test_the_longest_word_is_found(words: list[str], text: str) -> None:
    plain = "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"
    found = [match.span() for match in re.finditer(any_of(words), text)]
    assert found == [match.span() for match in re.finditer(plain, text)]


@given(words=_WORDS, text=_TEXT)
def test_every_start_is_found_overlaps_included(words: list[str], text: str) -> None:
    starts = [at for at in range(len(text)) if any(text.startswith(word, at) for word in words)]
    assert [match.start() for match in re.finditer(first_of(words), text)] == starts
