"""From a checked wire request to engine requests, and the choices that read their events.

Here lie the limits that need the model: context, vocabulary, choices, deadlines, seeds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.api.sampling import (
    MAX_DEADLINE_MS,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
    SamplingFields,
    check_ids,
    check_seed,
    choice_seed,
    int_within,
    text_rules,
    to_sampling,
    top_logprobs,
)
from fastserve_jax.api.usage import Usage, usage
from fastserve_jax.core.types import Event, Request
from fastserve_jax.errors import InvalidRequest
from fastserve_jax.server.choice import Choice
from fastserve_jax.server.generate import Events, generate
from fastserve_jax.server.served import Served, bounds
from fastserve_jax.server.state import ServerState

LONG_TEXT_CHARS = 16_384  # longer texts are encoded in a thread, so that streams go on
CHARS_PER_TOKEN = 6  # more than a tokenizer makes of prose: where a text is judged by its head


@dataclass(frozen=True, slots=True)
class Job:
    """`n` choices for each prompt: choice k of prompt p has index p * n + k."""

    served: Served
    prompts: Sequence[list[int]]
    n: int
    requests: Sequence[Request]
    choices: Sequence[Choice]

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Events]:
        """Submits the requests. Leaving ends them all."""
        try:
            async with generate(self.served.engine, self.requests) as events:
                yield events
        finally:
            for choice in self.choices:
                choice.close()

    async def run(self) -> list[str]:
        """The whole text of every choice."""
        texts: list[list[str]] = [[] for _ in self.choices]
        async with self.events() as events:
            async for batch in events:
                for index, _, text in self.shown(events, batch):
                    texts[index].append(text)
        return ["".join(pieces) for pieces in texts]

    def shown(
        self, events: Events, batch: Iterable[tuple[int, Event]]
    ) -> Iterable[tuple[int, Choice, str]]:
        """(index, choice, text to show) for each event; ends choices that have stopped."""
        for index, event in batch:
            choice = self.choices[index]
            if choice.finish is not None:
                continue
            text = choice.feed(event)
            if choice.finish is not None:
                events.stop(index)
            yield index, choice, text

    def usage(self) -> Usage:
        prompt_tokens = sum(map(len, self.prompts))
        cached = sum(choice.cached_tokens for choice in self.choices[:: self.n])
        return usage(prompt_tokens, sum(c.output_tokens for c in self.choices), cached)


async def refuse_overlong(served: Served, text: str) -> None:
    """Raises InvalidRequest for a text that cannot fit, from its head: encoding all of a megabyte
    takes half a second."""
    head = text[: served.context * CHARS_PER_TOKEN]
    if len(head) == len(text):
        return
    if len(await encode_text(served, head, False)) > served.context:
        raise InvalidRequest(
            f"the prompt has more than {served.context} tokens, this model's context: shorten it",
            param="prompt",
            code="context_length_exceeded",
        )


async def encode_text(served: Served, text: str, add_special: bool) -> list[int]:
    if len(text) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(served.tokenizer.encode, text, add_special)
    return served.tokenizer.encode(text, add_special)


async def encode_chat(
    served: Served,
    turns: list[ChatTurn],
    tools: list[dict[str, object]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Raises InvalidRequest when the model has no chat template or it refuses the messages."""
    template = served.template
    if template is None:
        raise InvalidRequest(
            "this model has no chat template: use /v1/completions", code="no_chat_template"
        )
    encode = functools.partial(
        template.encode, turns, tools=tools, add_generation_prompt=add_generation_prompt
    )
    contents = [str(turn["content"]) for turn in turns]
    for content in contents:
        await refuse_overlong(served, content)
    if sum(map(len, contents)) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(encode)
    return encode()


def output_limit(served: Served, prompt: list[int], limit: int | None, default: int | None) -> int:
    """Tokens to produce: what was asked, or `default`, or all that fits (both None)."""
    room = served.context - len(prompt)
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and this model's context is {served.context}: "
            f"shorten it to at most {served.context - 1}",
            param="prompt",
            code="context_length_exceeded",
        )
    if limit is None:
        return room if default is None else min(default, room)
    if limit > room:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and the context {served.context}: "
            f"ask for at most {room} output tokens, not {limit}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return limit


def build(
    state: ServerState,
    served: Served,
    fields: SamplingFields,
    prompts: Sequence[list[int]],
    *,
    limit: int | None,
    default_limit: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    timeout_header: str | None = None,
    owner: str = "",
) -> Job:
    """Check what the model decides and make the engine's requests. `owner` is whose key it is.

    Raises InvalidRequest naming the field.
    """
    limits = bounds(served, state.config.max_choices)
    n = int_within("n", fields.n, 1, limits.max_choices, 1)
    if n * len(prompts) > limits.max_choices:
        raise InvalidRequest(
            f"at most {limits.max_choices} choices in one request, prompts times n", param="n"
        )
    rules = text_rules(fields, limits)
    seed = check_seed(fields)
    base_seed = secrets.randbits(32) if seed is None else seed
    priority = int_within("priority", fields.priority, -MAX_PRIORITY, MAX_PRIORITY, 0)
    salt = fields.cache_salt or ""
    if len(salt) > MAX_SALT_CHARS:
        raise InvalidRequest("cache_salt is too long", param="cache_salt")
    deadline = _deadline(state, served, fields, timeout_header)
    client, session = _accounts(fields, owner)
    requests, choices = [], []
    prompts = [[*prompt, *served.opening] for prompt in prompts]
    for prompt in prompts:
        max_tokens = output_limit(served, prompt, limit, default_limit)
        check_ids(prompt, limits.vocab_size, "prompt")
        sampling = to_sampling(
            fields,
            limits,
            max_tokens=max_tokens,
            end_ids=rules.end_ids,
            logprobs=logprobs,
            prompt_logprobs=top_logprobs("prompt_logprobs", fields.prompt_logprobs)
            if prompt_logprobs is None
            else prompt_logprobs,
        )
        tokens = tuple(prompt)
        for k in range(n):
            seeded = dataclasses.replace(sampling, seed=choice_seed(base_seed, k))
            request_id = served.engine.new_id()
            requests.append(
                Request(
                    *(request_id, tokens, seeded, priority, deadline, salt, client, session),
                    adapter=served.adapter,
                )
            )
            meter = state.metrics.of(served.name).request(len(prompt))
            records = logprobs is not None
            choices.append(Choice(served.tokenizer, rules, meter, records=records))
    return Job(served, prompts, n, requests, choices)


def _accounts(fields: SamplingFields, owner: str) -> tuple[str, str]:
    """Whose service this counts as: the key's holder, or the user it names; and its session's."""
    user = fields.safety_identifier or fields.user or ""
    session = fields.session_id or ""
    for name, value in (("user", user), ("session_id", session)):
        if len(value) > MAX_NAME_CHARS:
            raise InvalidRequest(f"{name} is longer than {MAX_NAME_CHARS} characters", param=name)
    client = f"{owner}/{user}" if owner or user else ""
    return client, f"{client}/{session}" if session else ""


def _deadline(
    state: ServerState, served: Served, fields: SamplingFields, header: str | None
) -> float | None:
    asked_ms = fields.deadline_ms
    if asked_ms is None and header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 12):
            raise InvalidRequest("X-Request-Timeout-Ms must be a number of milliseconds")
        asked_ms = float(header)
    limit_s = state.config.request_timeout_s
    if asked_ms is None:
        return None if limit_s is None else served.engine.time() + limit_s
    if not 0 < asked_ms <= MAX_DEADLINE_MS:
        raise InvalidRequest(
            f"deadline_ms must be above 0 and at most {MAX_DEADLINE_MS}", param="deadline_ms"
        )
    asked_s = asked_ms / 1000
    return served.engine.time() + (asked_s if limit_s is None else min(asked_s, limit_s))
