from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.api import sse
from fastserve_jax.api.sse import EventParser, ServerEvent

TEXTS = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(TEXTS, st.sampled_from([None, "a", "response.created"]))), st.data())
def test_frames_are_parsed_back_wherever_the_bytes_are_cut(events, data):
    stream = b"".join(sse.frame(text.encode(), name) for text, name in events)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    edges = sorted({0, len(stream), *cuts})
    parser = EventParser()
    parsed = [
        event
        for start, end in itertools.pairwise(edges)
        for event in parser.push(stream[start:end])
    ]
    assert parsed == [ServerEvent(text, name or "message") for text, name in events]


def test_comments_carriage_returns_and_several_data_lines():
    parser = EventParser()
    stream = (
        b": keep-alive\r\n\r\nevent: x\r\ndata: one\r\ndata:two\r\nid: 7\r\n\r\ndata: [DONE]\n\n"
    )
    assert parser.push(stream) == [ServerEvent("one\ntwo", "x"), ServerEvent("[DONE]")]


def test_an_endless_event_is_not_kept(monkeypatch):
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    parser = EventParser()
    for _ in range(10):
        parser.push(b"x" * 100)
    with pytest.raises(ValueError, match="longer than"):
        parser.push(b"x")
