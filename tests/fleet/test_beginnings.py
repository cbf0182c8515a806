"""What a router reads of a request: shared beginnings, weights, and nothing that could break it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.fleet.beginnings import BLOCK_BYTES, BYTES_PER_TOKEN, beginnings

LONG = "All happy families are alike; each unhappy one is unhappy in its own way. " * 40

DEEP = b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}"


def of(**body):
    return beginnings(json.dumps(body).encode())


def shared(one, other):
    pairs = zip(one.names, other.names, strict=False)
    return sum(a == b for a, b in pairs)


def test_prompts_that_begin_alike_have_names_in_common():
    whole, more = of(prompt=LONG), of(prompt=LONG + "And then?")
    assert len(whole.names) == len(LONG) // BLOCK_BYTES
    assert shared(whole, more) == len(whole.names)
    other = of(prompt=LONG[:1000] + "!" + LONG[1001:])
    assert shared(whole, other) == 1000 // BLOCK_BYTES


def test_a_conversation_that_goes_on_begins_as_it_did():
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
    first, second = of(messages=turns[:1]), of(messages=turns)
    assert shared(first, second) == len(first.names) > 5


def test_other_models_and_salts_share_nothing():
    plain = of(prompt=LONG)
    assert not shared(plain, of(prompt=LONG, model="a"))
    assert not shared(plain, of(prompt=LONG, cache_salt="a"))
    assert shared(of(prompt=LONG, temperature=0), of(prompt=LONG, temperature=1)) > 5


def test_what_a_request_weighs():
    assert of(prompt="x" * 400, max_tokens=10).tokens == 400 / BYTES_PER_TOKEN + 10
    assert of(prompt="x" * 400, max_completion_tokens=7).tokens == 107
    assert of(prompt="", max_tokens=1 << 30).tokens == 512, "few use all that they allow"
    assert of(prompt="").tokens == 512
    assert of(input=LONG, max_output_tokens=5).tokens == len(LONG) / BYTES_PER_TOKEN + 5


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, DEEP, b'{"prompt": 3, "max_tokens": "x"}'],
)
def test_what_is_no_request_is_a_replicas_to_refuse(body):
    assert beginnings(body).tokens >= 0


def test_a_long_prompt_costs_no_more_than_its_beginning():
    assert len(of(prompt="x" * 10_000_000).names) == 256


@given(st.binary(max_size=200))
def test_bytes_of_any_kind(body):
    assert beginnings(body).tokens >= 0


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_prompts_of_any_kind(prompt):
    assert of(prompt=prompt, messages=prompt, max_tokens=prompt).tokens >= 0
