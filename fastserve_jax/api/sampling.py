"""The fields that say how tokens are drawn, shared by every generating route, and their ranges.

The one place where wire values become `core.types.Sampling`. Knows no route and no tokenizer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from fastserve_jax.core.types import MAX_TOP_LOGPROBS, Sampling
from fastserve_jax.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 300
MAX_SALT_CHARS = 256
MAX_NAME_CHARS = 512  # of a user or a session
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PRIORITY = 1_000_000


class RefusedFields(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Known fields that would change the answer and are not served; harmless values pass."""

    best_of: object = None
    suffix: object = None
    use_beam_search: object = None
    length_penalty: object = None
    allowed_token_ids: object = None
    bad_words: object = None
    truncate_prompt_tokens: object = None
    logits_processors: object = None
    structured_outputs: object = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None
    prompt_embeds: object = None
    response_format: object = None


class SamplingFields(RefusedFields, kw_only=True):
    """OpenAI's fields and the usual extensions; None is what leaving a field out means."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    n: int | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    cache_salt: str | None = None
    user: str | None = None  # OpenAI's name of the client's own user; its successor below
    safety_identifier: str | None = None
    session_id: str | None = None


_HARMLESS: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What leaving a field out means: OpenAI's values, unless the model's makers advise others."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """What a request is measured against."""

    vocab_size: int
    context: int  # tokens, prompt and output together
    eos_ids: frozenset[int]
    max_choices: int = 128
    defaults: Defaults = Defaults()


@dataclass(frozen=True, slots=True)
class TextRules:
    """What the text layer does with the tokens; the engine never sees these."""

    stops: tuple[str, ...] = ()
    keep_stop: bool = False  # the stop string, or the stopping token's text, stays in the output
    skip_special: bool = True
    end_ids: frozenset[int] = frozenset()  # tokens that end the request


def within(name: str, value: float | None, low: float, high: float, default: float) -> float:
    """`value` or its default; raises InvalidRequest naming `name` outside [low, high]."""
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", param=name)
    return value


def int_within(name: str, value: int | None, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}", param=name)
    return value


def refuse_unserved(fields: RefusedFields, n: int) -> None:
    if fields.best_of not in (None, n) or fields.best_of is True:
        raise InvalidRequest("best_of must be absent or equal to n", param="best_of")
    for name in RefusedFields.__struct_fields__:
        value = getattr(fields, name)
        if name == "best_of" or value is None or value in _HARMLESS.get(name, ()):
            continue
        raise InvalidRequest(f"{name} is not supported by this server", param=name)


def choice_seed(seed: int, index: int) -> int:
    """uint32 seed of choice `index`; choice 0 has the request's own."""
    if index == 0:
        return (seed ^ (seed >> 32)) & 0xFFFFFFFF if seed > 0xFFFFFFFF or seed < 0 else seed
    digest = hashlib.blake2s(b"%d:%d" % (seed, index), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def check_seed(fields: SamplingFields) -> int | None:
    if fields.seed is None:
        return None
    if not -(2**63) <= fields.seed < 2**63:
        raise InvalidRequest("seed must be a 64-bit integer", param="seed")
    return fields.seed


def text_rules(fields: SamplingFields, bounds: ModelBounds) -> TextRules:
    stops = fields.stop or []
    if isinstance(stops, str):
        stops = [stops]
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop holds at most {MAX_STOPS} strings", param="stop")
    if any(not s or len(s) > MAX_STOP_CHARS for s in stops):
        raise InvalidRequest(
            f"each stop string has between 1 and {MAX_STOP_CHARS} characters", param="stop"
        )
    ids = fields.stop_token_ids or []
    if len(ids) > MAX_STOPS:
        raise InvalidRequest(f"stop_token_ids holds at most {MAX_STOPS}", param="stop_token_ids")
    check_ids(ids, bounds.vocab_size, "stop_token_ids")
    eos = frozenset[int]() if fields.ignore_eos else bounds.eos_ids
    return TextRules(
        stops=tuple(stops),
        keep_stop=bool(fields.include_stop_str_in_output),
        skip_special=fields.skip_special_tokens is not False,
        end_ids=eos | frozenset(ids),
    )


def check_ids(ids: list[int], vocab_size: int, param: str) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise InvalidRequest(f"token ids must be between 0 and {vocab_size - 1}", param=param)


def _bias(fields: SamplingFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.logit_bias or {}
    if len(given) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias holds at most {MAX_LOGIT_BIAS}", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias keys are token ids between 0 and {vocab_size - 1}", param="logit_bias"
            )
        bias[int(key)] = within("logit_bias", value, -100, 100, 0.0)
    return tuple(sorted(bias.items()))


def to_sampling(
    fields: SamplingFields,
    bounds: ModelBounds,
    *,
    max_tokens: int,
    end_ids: frozenset[int],
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> Sampling:
    """Check every range and build the core's Sampling, with seed 0: choices get theirs later.

    `logprobs` and `prompt_logprobs` count alternatives, already in range.
    """
    defaults = bounds.defaults
    top_k = fields.top_k if fields.top_k is not None else defaults.top_k
    if top_k < -1:
        raise InvalidRequest("top_k must be positive, or 0 or -1 to keep all", param="top_k")
    top_p = within("top_p", fields.top_p, 0, 1, defaults.top_p)
    if top_p == 0:
        raise InvalidRequest("top_p must be greater than 0", param="top_p")
    repetition = within(
        "repetition_penalty", fields.repetition_penalty, 0, 10, defaults.repetition_penalty
    )
    if repetition == 0:
        raise InvalidRequest("repetition_penalty must be above 0", param="repetition_penalty")
    return Sampling(
        max_tokens=max_tokens,
        temperature=within("temperature", fields.temperature, 0, 2, defaults.temperature),
        top_k=min(max(top_k, 0), bounds.vocab_size),
        top_p=top_p,
        min_p=within("min_p", fields.min_p, 0, 1, defaults.min_p),
        repetition_penalty=repetition,
        presence_penalty=within("presence_penalty", fields.presence_penalty, -2, 2, 0.0),
        frequency_penalty=within("frequency_penalty", fields.frequency_penalty, -2, 2, 0.0),
        logit_bias=_bias(fields, bounds.vocab_size),
        min_tokens=int_within("min_tokens", fields.min_tokens, 0, max_tokens, 0),
        stop_ids=end_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def top_logprobs(name: str, value: int | None) -> int | None:
    """A count of alternatives in OpenAI's range, or None."""
    return None if value is None else int_within(name, value, 0, MAX_TOP_LOGPROBS, 0)
