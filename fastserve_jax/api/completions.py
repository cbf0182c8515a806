"""/v1/completions on the wire. A prompt is text or token ids, one or several."""

from __future__ import annotations

from typing import cast

import msgspec
from msgspec import UNSET, UnsetType

from fastserve_jax.api.sampling import SamplingFields, refuse_unserved
from fastserve_jax.api.usage import StreamOptions, Usage
from fastserve_jax.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's

PromptTokens = str | list[int]


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id, for each prompt token


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    model: str | None = None  # left out: the one that is served
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    def prompts(self, max_prompts: int) -> list[PromptTokens]:
        """Each prompt as given. Raises InvalidRequest for an empty or mixed one, or too many."""
        given = self.prompt
        if isinstance(given, str):
            prompts: list[PromptTokens] = [given]
        elif (kinds := set(map(type, given))) == {int}:
            prompts = [cast(list[int], given)]
        elif len(kinds) > 1:
            raise InvalidRequest("prompt mixes texts and token ids", param="prompt")
        else:
            prompts = cast(list[PromptTokens], given)
        if not prompts or not all(prompts):
            raise InvalidRequest("prompt must not be empty", param="prompt")
        if len(prompts) > max_prompts:
            raise InvalidRequest(f"at most {max_prompts} prompts in one request", param="prompt")
        return prompts

    def check(self) -> None:
        refuse_unserved(self, 1 if self.n is None else self.n)
        if self.max_tokens is not None and self.max_tokens < (0 if self.echo else 1):
            raise InvalidRequest(
                "max_tokens must be at least 1, or 0 together with echo", param="max_tokens"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs needs stream: false", param="prompt_logprobs")


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists over tokens; an echoed prompt's first token has no log-probability."""

    tokens: list[str] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)
    text_offset: list[int] = msgspec.field(default_factory=list)  # characters from the text's start


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """A whole answer, and one chunk of a streamed one: OpenAI gives both this shape."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str = ""
    usage: Usage | UnsetType | None = UNSET
