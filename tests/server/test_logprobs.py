from __future__ import annotations

import math

from fastserve_jax.core.types import Scored
from fastserve_jax.server.choice import TokenRecord
from fastserve_jax.server.logprobs import (
    FLOOR,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    prompt_records,
)

from .kit import LetterTokenizer, token_ids

TOKENIZER = LetterTokenizer()
A, B, C = TOKENIZER.encode("abc", add_special=False)


def top_of(token: int, logprob: float, top: tuple) -> dict[str, float]:
    (named,) = completion_logprobs(TOKENIZER, [TokenRecord(token, 0, logprob, top)]).top_logprobs
    assert named is not None
    return named


def test_the_drawn_token_is_always_among_the_alternatives_with_its_own_float():
    assert top_of(A, -0.125, ((B, -0.5),)) == {"b": -0.5, "a": -0.125}
    assert top_of(A, -0.125, ()) == {"a": -0.125}
    rounded = -0.12500001
    assert top_of(A, -0.125, ((A, rounded), (B, -0.5))) == {"a": -0.125, "b": -0.5}


def test_tokens_with_one_text_are_all_kept():
    class Twins(LetterTokenizer):
        def token_text(self, id: int) -> str:
            return "same"

    (named,) = completion_logprobs(
        Twins(), [TokenRecord(A, 0, -1.0, ((B, -0.25), (C, -0.5), (A, -1.0)))]
    ).top_logprobs
    assert named == {f"token_id:{B}": -0.25, f"token_id:{C}": -0.5, "same": -1.0}


def test_impossible_tokens_have_a_number_that_json_knows():
    for impossible in (-math.inf, math.nan, None):
        record = TokenRecord(A, 0, impossible, ((B, impossible or -math.inf),))
        whole = completion_logprobs(TOKENIZER, [record])
        assert whole.token_logprobs == [FLOOR]
        assert set(whole.top_logprobs[0].values()) == {FLOOR}
        (entry,) = chat_logprobs(TOKENIZER, [record]).content
        assert entry.logprob == entry.top_logprobs[0].logprob == FLOOR


def test_a_prompts_first_token_has_no_score_and_offsets_follow_the_text():
    prompt = token_ids("hé!")
    scored = [Scored(i, -float(i), ()) for i in range(1, len(prompt))]
    records = prompt_records(TOKENIZER, prompt, scored, skip_special=True)
    assert [record.token for record in records] == prompt
    assert [record.logprob for record in records] == [None, -1.0, -2.0, -3.0, -4.0]
    assert [record.offset for record in records] == [0, 0, 1, 1, 2]


def test_prompt_logprobs_rank_the_alternatives():
    scores = prompt_logprobs(TOKENIZER, [A, B], [Scored(1, -3.0, ((C, -0.1), (A, -0.2)))])
    assert scores[0] is None
    assert [(key, s.logprob, s.rank) for key, s in scores[1].items()] == [
        (str(C), -0.1, 1),
        (str(A), -0.2, 2),
        (str(B), -3.0, None),
    ]
