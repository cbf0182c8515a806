"""What an answer cost in tokens, as chat and completions report it."""

from __future__ import annotations

import msgspec

from fastserve_jax.errors import InvalidRequest


class PromptDetails(msgspec.Struct):
    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = msgspec.field(default_factory=PromptDetails)
    completion_tokens_details: CompletionDetails = msgspec.field(default_factory=CompletionDetails)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptDetails(cached_tokens=cached_tokens),
    )


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted; nothing is obfuscated


def usage_wanted(stream: bool | None, options: StreamOptions | None) -> tuple[bool, bool]:
    """(a last chunk with usage, usage in every chunk)"""
    if options is None:
        return False, False
    if not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    last = bool(options.include_usage)
    return last, last and bool(options.continuous_usage_stats)
