"""What is different for a prompt that an encoder reads: it is run whole, and hangs together.

Of such a prompt all but the last token is a source. What is computed of each of its tokens hangs on
all of them, so pages are found by the name of the whole. Decides nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import InvalidRequest
from .prefix import root_digest, tail_digest
from .sequence import Limits, Sequence
from .types import Request


def sequence_of(request: Request, limits: Limits, now: float) -> Sequence:
    """The record of a new request."""
    source = len(request.prompt) - 1 if limits.encodes else 0
    if source:
        name = tail_digest(root_digest(request.cache_salt), request.prompt[:source])
        request = replace(request, cache_salt=name.hex())
    return Sequence(request, list(request.prompt), source, submitted=now)


def refuse_source(request: Request, limits: Limits) -> None:
    """Raises InvalidRequest for a source that no step has room for, and for what an encoder does
    not say of it; of a prompt that is none nothing is refused."""
    if not limits.encodes:
        return
    source, most = len(request.prompt) - 1, limits.longest_source
    if not source:
        raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
    if source > most:
        raise InvalidRequest(
            f"the source has {source} tokens, and an encoder reads at most {most} in one step: "
            "shorten it, or start the server with a higher engine.step_tokens",
            param="prompt",
            code="context_length_exceeded",
        )
    if request.sampling.prompt_logprobs is not None:
        raise InvalidRequest(
            "an encoder reads the prompt and draws none of it, so there are no log-probabilities "
            "of its tokens: leave out prompt_logprobs, or logprobs with echo",
            param="prompt_logprobs",
        )
