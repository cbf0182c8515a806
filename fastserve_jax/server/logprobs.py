"""Log-probabilities in each route's shape. Knows the tokenizer, not the routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastserve_jax.api.chat import ChatLogprobs, TokenLogprob, TopLogprob
from fastserve_jax.api.completions import CompletionLogprobs, PromptLogprob, PromptLogprobs
from fastserve_jax.api.responses import OutputLogprob
from fastserve_jax.core.types import Scored, TopLogprobs
from fastserve_jax.server.choice import TokenRecord
from fastserve_jax.server.served import Tokenizer

FLOOR = -9999.0  # JSON has no -inf; OpenAI writes this for it


def _finite(logprob: float | None) -> float:
    return FLOOR if logprob is None or not logprob > FLOOR else logprob


def _named_top(
    tokenizer: Tokenizer, token: int, logprob: float | None, top: TopLogprobs
) -> dict[str, float]:
    """Alternatives by text, always with the token itself. Two tokens of one text get an id each."""
    named: dict[str, float] = {}
    for other, value in (*top, (token, logprob)):
        name = tokenizer.token_text(other)
        if other == token:
            value = logprob
        elif name in named or name == tokenizer.token_text(token):
            name = f"token_id:{other}"
        named[name] = _finite(value)
    return named


def completion_logprobs(
    tokenizer: Tokenizer, records: Iterable[TokenRecord], offset: int = 0
) -> CompletionLogprobs:
    """`offset`: characters of text before the records'."""
    out = CompletionLogprobs()
    for record in records:
        out.tokens.append(tokenizer.token_text(record.token))
        out.token_logprobs.append(_finite(record.logprob))
        top = _named_top(tokenizer, record.token, record.logprob, record.top)
        out.top_logprobs.append(top)
        out.text_offset.append(offset + record.offset)
    return out


def prompt_records(
    tokenizer: Tokenizer, prompt: Sequence[int], scored: Sequence[Scored], skip_special: bool
) -> list[TokenRecord]:
    """One record per prompt token; the first has no log-probability."""
    by_position = {score.position: score for score in scored}
    stream = tokenizer.stream(skip_special, at_start=True)
    records, offset = [], 0
    for position, token in enumerate(prompt):
        score = by_position.get(position)
        logprob, top = (score.logprob, score.top) if score else (None, ())
        records.append(TokenRecord(token, offset, logprob, top))
        offset += len(stream.push(token))
    return records


def echoed(
    tokenizer: Tokenizer, prompt: Sequence[TokenRecord], output: CompletionLogprobs
) -> CompletionLogprobs:
    """The prompt's log-probabilities followed by the output's."""
    out = completion_logprobs(tokenizer, prompt)
    out.token_logprobs[0] = None
    out.top_logprobs[0] = None
    out.tokens += output.tokens
    out.token_logprobs += output.token_logprobs
    out.top_logprobs += output.top_logprobs
    out.text_offset += output.text_offset
    return out


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], scored: Sequence[Scored]
) -> PromptLogprobs:
    """By token id, best first, the prompt's own token always among them."""
    by_position = {score.position: score for score in scored}
    out: PromptLogprobs = []
    for position, token in enumerate(prompt):
        score = by_position.get(position)
        if score is None:
            out.append(None)
            continue
        ranked = {
            str(other): PromptLogprob(_finite(value), rank, tokenizer.token_text(other))
            for rank, (other, value) in enumerate(score.top, 1)
        }
        own = PromptLogprob(_finite(score.logprob), None, tokenizer.token_text(token))
        ranked.setdefault(str(token), own)
        out.append(ranked)
    return out


def _top(tokenizer: Tokenizer, top: TopLogprobs) -> list[TopLogprob]:
    return [
        TopLogprob(tokenizer.token_text(t), _finite(value), list(tokenizer.token_bytes(t)))
        for t, value in top
    ]


def chat_logprobs(tokenizer: Tokenizer, records: Iterable[TokenRecord]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                tokenizer.token_text(r.token),
                _finite(r.logprob),
                list(tokenizer.token_bytes(r.token)),
                _top(tokenizer, r.top),
            )
            for r in records
        ]
    )


def output_logprobs(tokenizer: Tokenizer, records: Iterable[TokenRecord]) -> list[OutputLogprob]:
    return [
        OutputLogprob(
            tokenizer.token_text(r.token),
            _finite(r.logprob),
            list(tokenizer.token_bytes(r.token)),
            _top(tokenizer, r.top),
        )
        for r in records
    ]
