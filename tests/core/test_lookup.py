"""What a text says comes next, against a search of the whole text, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_jax.core.lookup import _REMEMBERED, Lookup, Odds

texts = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), max_size=60))


class Search:
    """The same by definition: nothing is indexed, all is compared."""

    def __init__(self, given):
        self.given, self.tokens, self.at = given, [], None

    def add(self, token):
        if len(self.tokens) >= self.given and self.at is not None:
            self.at = self.at + 1 if self.tokens[self.at] == token else None
        self.tokens.append(token)
        if self.at is None and len(self.tokens) >= self.given:
            self.at = self.latest(3)
            self.at = self.latest(2) if self.at is None else self.at

    def latest(self, count):
        """Where the last `count` tokens stood before, most recently: the position behind them."""
        tokens, last = self.tokens, self.tokens[-count:]
        for end in range(len(tokens) - 1, count - 1, -1):
            if tokens[end - count : end] == last:
                return end
        return None

    def guess(self, count):
        tokens = list(self.tokens)
        for i in range(count):
            tokens.append(tokens[self.at + i])
        return tuple(tokens[len(self.tokens) :])


@settings(max_examples=400, deadline=None)
@given(texts, st.integers(0, 8), st.integers(1, 9))
def test_it_expects_what_a_search_finds(text, given, count):
    search, tokens = Search(given), []
    lookup = Lookup(tokens, given, Odds())
    for token in text:
        search.add(token)
        tokens.append(token)
        assert lookup.follow(5) == 1
        if len(tokens) < given:
            continue
        assert lookup.expects == (search.at is not None)
        if lookup.expects:
            assert lookup.guess(count) == search.guess(count)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(0, 8), st.lists(st.integers(1, 7), min_size=60, max_size=60))
def test_taking_in_piece_by_piece_changes_nothing(text, given, pieces):
    whole, parts = (Lookup(text, given, Odds()) for _ in range(2))
    whole.follow(1_000)
    for piece in pieces:
        parts.follow(piece)
    assert parts.follow(9) == 0
    assert parts.expects == whole.expects
    assert parts.chances(9) == whole.chances(9)
    if whole.expects:
        assert parts.guess(9) == whole.guess(9)


def test_nothing_is_expected_before_all_is_taken_in():
    lookup = Lookup([1, 2, 3, 1, 2], 5, Odds())
    lookup.follow(4)
    assert not lookup.expects
    lookup.follow(4)
    assert lookup.guess(2) == (3, 1)


def test_three_tokens_are_better_than_two():
    tokens = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    lookup = Lookup(tokens, len(tokens), Odds())
    lookup.follow(99)
    assert lookup.guess(1) == (9,)


def test_a_repetition_is_taken_to_go_on():
    lookup = Lookup([5, 1, 2, 1, 2, 1], 6, Odds())
    lookup.follow(99)
    assert lookup.guess(5) == (2, 1, 2, 1, 2)


def test_chances_rise_with_what_was_right_and_fall_with_what_was_not():
    def after(output):
        lookup = Lookup([1, 2, 3, 4, 5, 6, 10, 11, 1, 2, *output], 10, Odds())
        lookup.follow(99)
        return lookup

    fresh, right = after([]), after([3, 4, 5, 6])
    assert right.chances(1) > fresh.chances(1)
    assert right.chances(4) == sorted(right.chances(4), reverse=True)
    wrong = after([9, 1, 2, 8, 1, 2, 7, 1, 2])
    assert wrong.expects
    assert wrong.chances(1) < fresh.chances(1)
    assert wrong.guess(1) == (7,)


def test_a_new_text_is_expected_to_be_like_the_others():
    odds = Odds()

    def chance():
        fresh = Lookup([1, 2, 3, 1, 2], 5, odds)
        fresh.follow(99)
        return fresh.chances(1)[0]

    before = chance()
    for _ in range(50):
        Lookup([1, 2, 3, 1, 2, 9], 5, odds).follow(99)
    low = chance()
    for _ in range(200):
        Lookup([1, 2, 3, 1, 2, 3], 5, odds).follow(99)
    assert low < before < chance()


@pytest.mark.parametrize("distance", [_REMEMBERED - 9, 3 * _REMEMBERED])
def test_memory_is_bounded_and_what_is_near_is_remembered(distance):
    tokens = [1, 2, 3, 4, *range(100, 100 + distance), 1, 2, 3]
    lookup = Lookup(tokens, len(tokens), Odds())
    lookup.follow(len(tokens))
    assert lookup.expects == (distance < _REMEMBERED)
    held = (lookup._pairs, lookup._triples, lookup._last_pairs, lookup._last_triples)
    assert max(map(len, held)) <= _REMEMBERED
