from __future__ import annotations

import msgspec
import pytest

from fastserve_jax.api import wire
from fastserve_jax.api.completions import CompletionRequest
from fastserve_jax.errors import InvalidRequest, Overloaded


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"m","prompt":"x","max_tokens":true}', "max_tokens"),
        (b'{"model":"m","prompt":"x","max_tokens":"5"}', "max_tokens"),
        (b'{"model":"m","prompt":"x","max_tokens":5.5}', "max_tokens"),
        (b'{"model":"m","prompt":"x","temperature":true}', "temperature"),
        (b'{"model":"m","prompt":"x","temperature":1e999}', "temperature"),
        (b'{"model":"m","prompt":"x","temperature":NaN}', None),
        (b'{"model":"m","prompt":"x","temperature":-Infinity}', None),
        (b'{"model":"m","prompt":"x","stream":1}', "stream"),
        (b'{"model":"m","prompt":{"a":1}}', "prompt"),
        (b'{"model":"m","prompt":["a",null]}', "prompt[1]"),
        (b'{"model":"m","prompt":[[1,true]]}', "prompt[0][1]"),
        (b'{"model":"m"}', "prompt"),
        (b'{"model":5,"prompt":"x"}', "model"),
        (b'{"model":"m","prompt":"\xff\xfe"}', None),
        (b'{"model":"m","prompt":"\xed\xa0\x80"}', None),
        (b'{"model":"m","prompt":"\\ud800"}', None),
        (b"[]", None),
        (b"null", None),
        (b'"text"', None),
        (b"", None),
        (b"{", None),
        (b'{"model":"m","prompt":"x"}{}', None),
        (b'{"model":"m","prompt":"x","junk":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"model":"m","junk":' + b'{"a":' * 100_000, None),
    ],
)
def test_faulty_bytes_are_the_clients_fault_and_name_the_field(body, param):
    with pytest.raises(InvalidRequest) as caught:
        wire.decode(body, CompletionRequest)
    assert caught.value.param == param


def test_unknown_fields_are_ignored_and_numbers_may_be_whole():
    asked = wire.decode(
        b'{"model":"m","prompt":"x","nobody_knows":[1,{"a":2}],"temperature":1}', CompletionRequest
    )
    assert asked.temperature == 1.0


def test_an_error_has_all_four_fields_even_when_null():
    body = msgspec.json.decode(wire.encode(wire.error_answer(Overloaded("busy"))))
    assert body == {
        "error": {
            "message": "busy",
            "type": "overloaded_error",
            "param": None,
            "code": "server_overloaded",
        }
    }


def test_a_request_travels_without_the_fields_left_out():
    asked = CompletionRequest(model="m", prompt="x", max_tokens=3)
    assert msgspec.json.decode(wire.encode(asked)) == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 3,
    }
