from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.api.sampling import TextRules
from fastserve_jax.core.types import DoneEvent, Finish, TokenEvent
from fastserve_jax.errors import DeadlineExceeded, EngineFailed, Overloaded
from fastserve_jax.meters import ModelMetrics
from fastserve_jax.server.choice import Choice

from .kit import EOS, PIECES, LetterTokenizer

TOKENIZER = LetterTokenizer()


def make(rules: TextRules = TextRules(), records: bool = True) -> Choice:  # noqa: B008
    return Choice(TOKENIZER, rules, ModelMetrics("m").request(1), records=records)


def feed(choice: Choice, tokens: list[int], reason: Finish = Finish.LENGTH) -> str:
    text = ""
    for token in tokens:
        text += choice.feed(TokenEvent(1, token, -1.0))
        if choice.finish is not None:
            return text
    return text + choice.feed(DoneEvent(1, reason, len(tokens)))


TOKENS = st.lists(st.integers(2, len(PIECES) - 1), max_size=30)


@given(TOKENS)
def test_without_stops_the_text_is_the_decoded_tokens(tokens):
    choice = make()
    assert feed(choice, tokens) == TOKENIZER.decode(tokens)
    assert [record.token for record in choice.take_records()] == tokens
    assert choice.finish == "length"


@given(TOKENS, st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=3))
def test_records_are_of_tokens_whose_text_begins_before_the_cut(tokens, stops):
    choice = make(TextRules(stops=tuple(stops)))
    taken, text = [], ""
    for token in tokens:
        text += choice.feed(TokenEvent(1, token, -1.0))
        taken += choice.take_records()
        assert all(record.offset <= len(text) for record in taken)
        if choice.finish is not None:
            break
    else:
        text += choice.feed(DoneEvent(1, Finish.LENGTH, len(tokens)))
        taken += choice.take_records()
    assert [record.token for record in taken] == tokens[: len(taken)]
    if choice.finish == "length":
        assert len(taken) == len(tokens)
    else:
        assert all(record.offset < len(text) for record in taken)
        assert not any(stop in text for stop in stops)


def test_the_stopping_token_counts_and_is_not_shown():
    choice = make(TextRules(end_ids=frozenset({EOS, 5})))
    assert feed(choice, [6, 5], Finish.STOP) == TOKENIZER.token_text(6)
    assert choice.output_tokens == 2
    assert choice.take_ids() == [6, 5]
    assert [record.token for record in choice.take_records()] == [6]
    assert choice.finish == "stop"


def test_a_kept_stopping_token_is_shown():
    choice = make(TextRules(end_ids=frozenset({EOS, 5}), keep_stop=True))
    assert feed(choice, [6, 5], Finish.STOP) == TOKENIZER.decode([6, 5])


def test_half_a_character_is_held_and_then_replaced():
    first_half = PIECES.index(b"\xc3")
    choice = make()
    assert choice.feed(TokenEvent(1, first_half)) == ""
    assert choice.feed(DoneEvent(1, Finish.LENGTH, 1)) == "\ufffd"


def test_a_stop_string_completed_by_the_last_flush():
    choice = make(TextRules(stops=("\ufffd",)))
    choice.feed(TokenEvent(1, PIECES.index(b"\xc3")))
    assert choice.feed(DoneEvent(1, Finish.LENGTH, 1)) == ""
    assert choice.finish == "stop"


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (Finish.DEADLINE, DeadlineExceeded),
        (Finish.ERROR, EngineFailed),
        (Finish.CANCELLED, Overloaded),
    ],
)
def test_bad_endings_raise(reason, error):
    with pytest.raises(error):
        make().feed(DoneEvent(1, reason, 0))
