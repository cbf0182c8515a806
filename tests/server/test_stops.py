from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from fastserve_jax.server.stops import StopMatcher

LETTERS = st.text("ab\né", max_size=30)
STOPS = st.lists(st.text("ab\né", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def cut_by_letter(text: str, stops: tuple[str, ...], keep: bool) -> tuple[str, bool]:
    """The definition: the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if keep else end - max(map(len, found))], True
    return text, False


@given(st.lists(LETTERS, max_size=12), STOPS, st.booleans())
@example(["ab", "cd"], ("abcd", "bc"), False)
@example(["aab"], ("ab",), False)
def test_the_cut_does_not_depend_on_the_pieces(pieces, stops, keep):
    matcher = StopMatcher(stops, keep)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == cut_by_letter("".join(pieces), stops, keep)


@given(LETTERS, STOPS)
def test_nothing_shown_is_ever_taken_back_and_nothing_is_held_longer_than_needed(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for at, letter in enumerate(text, 1):
        shown += matcher.push(letter)
        if matcher.matched:
            break
        held = text[len(shown) : at]
        assert all(stop not in shown for stop in stops)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_over_many_tokens():
    matcher = StopMatcher(("###END###",))
    assert [matcher.push(piece) for piece in ("one #", "##", "EN", "D##", "# two")] == [
        "one ",
        "",
        "",
        "",
        "",
    ]
    assert matcher.matched
