from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_jax.api.sampling import (
    ModelBounds,
    SamplingFields,
    check_seed,
    choice_seed,
    refuse_unserved,
    text_rules,
    to_sampling,
    top_logprobs,
)
from fastserve_jax.core.types import Sampling
from fastserve_jax.errors import InvalidRequest

BOUNDS = ModelBounds(vocab_size=100, context=512, eos_ids=frozenset({2}))


def read(**fields: object) -> Sampling:
    asked = SamplingFields(**fields)
    rules = text_rules(asked, BOUNDS)
    check_seed(asked)
    return to_sampling(
        asked, BOUNDS, max_tokens=8, end_ids=rules.end_ids, logprobs=None, prompt_logprobs=None
    )


def test_nothing_asked_is_plain_sampling_that_ends_at_the_models_eos():
    assert read() == Sampling(max_tokens=8, stop_ids=frozenset({2}))


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("temperature", 0, 2),
        ("top_p", 0.001, 1),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.001, 10),
    ],
)
def test_ranges_include_their_ends_and_nothing_beyond(field, low, high):
    for value in (low, high):
        assert getattr(read(**{field: value}), field) == value
    for value in (low - 0.0011, high + 0.0011):
        with pytest.raises(InvalidRequest) as caught:
            read(**{field: value})
        assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
        ({"logit_bias": {"100": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1.5": 1.0}}, "logit_bias"),
        ({"logit_bias": {"٣": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias"),
        ({"logit_bias": {str(i): 0.0 for i in range(301)}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_what_is_out_of_range_is_named(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param == param


def test_extensions_reach_the_core():
    sampling = read(
        top_k=-1, logit_bias={"7": -3, "5": 2}, stop_token_ids=[9], min_tokens=3, ignore_eos=True
    )
    assert sampling.top_k == 0
    assert sampling.logit_bias == ((5, 2.0), (7, -3.0))
    assert sampling.stop_ids == {9}
    assert sampling.min_tokens == 3
    assert read(top_k=10**30).top_k == BOUNDS.vocab_size


@pytest.mark.parametrize("count", [0, 20])
def test_logprobs_up_to_twenty(count):
    assert top_logprobs("logprobs", count) == count
    assert top_logprobs("logprobs", None) is None
    with pytest.raises(InvalidRequest):
        top_logprobs("logprobs", 21)


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_choice_has_its_own_seed_and_the_first_the_requests(seed):
    seeds = [choice_seed(seed, i) for i in range(8)]
    assert all(0 <= s < 2**32 for s in seeds)
    assert seeds == [choice_seed(seed, i) for i in range(8)]
    if 0 <= seed < 2**32:
        assert seeds[0] == seed


def test_choices_of_one_seed_differ():
    assert len({choice_seed(1234, i) for i in range(128)}) == 128


@pytest.mark.parametrize(
    "field",
    [
        *("suffix", "use_beam_search", "length_penalty", "response_format", "guided_json"),
        *("logits_processors", "truncate_prompt_tokens", "allowed_token_ids", "prompt_embeds"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field):
    with pytest.raises(InvalidRequest) as caught:
        refuse_unserved(SamplingFields(**{field: {"type": "json_object"}}), 1)
    assert caught.value.param == field


def test_harmless_values_of_unserved_fields_pass():
    harmless = SamplingFields(
        best_of=2, suffix="", use_beam_search=False, length_penalty=1.0, response_format=None
    )
    refuse_unserved(harmless, 2)
    refuse_unserved(SamplingFields(response_format={"type": "text"}), 1)
    for best_of, n in ((3, 2), (True, 1), ("1", 1)):
        with pytest.raises(InvalidRequest):
            refuse_unserved(SamplingFields(best_of=best_of), n)
