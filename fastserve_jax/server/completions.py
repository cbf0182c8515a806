"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from aiohttp import web
from msgspec import UNSET

from fastserve_jax.api import sse, wire
from fastserve_jax.api.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from fastserve_jax.api.sampling import top_logprobs
from fastserve_jax.api.usage import Usage, usage, usage_wanted
from fastserve_jax.server.choice import Choice
from fastserve_jax.server.chunks import ChunkTemplate
from fastserve_jax.server.exchange import OWNER, STATE, json_answer, read_json
from fastserve_jax.server.job import Job, build, encode_text, refuse_overlong
from fastserve_jax.server.logprobs import (
    completion_logprobs,
    echoed,
    prompt_logprobs,
    prompt_records,
)
from fastserve_jax.server.served import Served
from fastserve_jax.server.state import ServerState
from fastserve_jax.server.streaming import stream_job


async def complete(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, CompletionRequest)
    asked.check()
    state = request.app[STATE]
    served = state.model(asked.model)
    timeout = request.headers.get("X-Request-Timeout-Ms")
    job, answer = await _prepare(state, served, asked, timeout, request[OWNER])
    if asked.stream:
        last, always = usage_wanted(asked.stream, asked.stream_options)
        return await stream_job(request, job, _Chunks(answer, last, always))
    usage_wanted(asked.stream, asked.stream_options)
    texts = await job.run()
    choices = [answer.choice(i, texts[i], whole=True) for i in range(len(texts))]
    return json_answer(answer.completion(choices, with_usage=True))


async def _prepare(
    state: ServerState,
    served: Served,
    asked: CompletionRequest,
    timeout_header: str | None,
    owner: str,
) -> tuple[Job, _Answer]:
    add_special = asked.add_special_tokens is not False
    given = asked.prompts(state.config.max_choices)
    for prompt in given:
        if isinstance(prompt, str):
            await refuse_overlong(served, prompt)
    prompts = [
        await encode_text(served, prompt, add_special) if isinstance(prompt, str) else prompt
        for prompt in given
    ]
    logprobs = top_logprobs("logprobs", asked.logprobs)
    limit = asked.max_tokens
    job = build(
        state,
        served,
        asked,
        prompts,
        limit=1 if limit == 0 else limit,
        default_limit=DEFAULT_MAX_TOKENS,
        logprobs=logprobs,
        prompt_logprobs=logprobs if asked.echo else None,
        timeout_header=timeout_header,
        owner=owner,
    )
    echoes = [""] * len(prompts)
    if asked.echo:
        skip = asked.skip_special_tokens is not False
        echoes = [
            prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt, skip)
            for prompt in given
        ]
    return job, _Answer(job, asked, echoes, f"cmpl-{secrets.token_hex(12)}", int(time.time()))


@dataclass(frozen=True, slots=True)
class _Answer:
    """Builds the parts of one answer, whole or in chunks."""

    job: Job
    asked: CompletionRequest
    echoes: list[str]  # by prompt, "" unless asked for
    id: str
    created: int

    def completion(
        self, choices: list[CompletionChoice], with_usage: bool | None = None
    ) -> Completion:
        """`with_usage` None leaves the field out, False makes it null."""
        served = self.job.served
        return Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=served.name,
            choices=choices,
            system_fingerprint=served.fingerprint,
            usage=UNSET if with_usage is None else (self._usage() if with_usage else None),
        )

    def _usage(self) -> Usage:
        spent = self.job.usage()
        if self.asked.max_tokens == 0:  # the engine draws one token all the same
            return usage(spent.prompt_tokens, 0, spent.prompt_tokens_details.cached_tokens)
        return spent

    def choice(self, index: int, text: str, *, whole: bool, first: bool = True) -> CompletionChoice:
        """What choice `index` has to say now; `first` brings the echo."""
        choice = self.job.choices[index]
        prompt = self.job.prompts[index // self.job.n]
        echo = self.echoes[index // self.job.n]
        if self.asked.max_tokens == 0:
            text = ""
        answer = CompletionChoice(
            index=index,
            text=echo + text if first else text,
            logprobs=self._logprobs(index, first) if self.asked.logprobs is not None else None,
            finish_reason=choice.finish,
        )
        if self.asked.return_token_ids:
            answer.token_ids = choice.take_ids()
            if first:
                answer.prompt_token_ids = prompt
        if whole and self.asked.prompt_logprobs is not None:
            tokenizer = self.job.served.tokenizer
            answer.prompt_logprobs = prompt_logprobs(tokenizer, prompt, choice.scored)
        return answer

    def _logprobs(self, index: int, first: bool) -> CompletionLogprobs:
        tokenizer = self.job.served.tokenizer
        choice = self.job.choices[index]
        echo = self.echoes[index // self.job.n]
        records = choice.take_records()
        if self.asked.max_tokens == 0:
            records = []
        out = completion_logprobs(tokenizer, records, len(echo))
        if first and self.asked.echo:
            prompt = self.job.prompts[index // self.job.n]
            skip = self.asked.skip_special_tokens is not False
            scored = prompt_records(tokenizer, prompt, choice.scored, skip)
            out = echoed(tokenizer, scored, out)
        return out


class _Chunks:
    """Text alone goes through a template; anything more is encoded as it is."""

    def __init__(self, answer: _Answer, last_usage: bool, every_usage: bool) -> None:
        self._answer = answer
        self._last_usage = last_usage
        self._every_usage = every_usage
        asked = answer.asked
        self._plain = not (asked.logprobs is not None or asked.return_token_ids or every_usage)
        self._begun: set[int] = set()
        self._templates = [
            ChunkTemplate(lambda text, i=i: self._chunk(CompletionChoice(i, text)))  # type: ignore[misc]
            for i in range(len(answer.job.choices))
        ]

    def _chunk(self, choice: CompletionChoice) -> Completion:
        with_usage = True if self._every_usage else (False if self._last_usage else None)
        return self._answer.completion([choice], with_usage)

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, choice: Choice, text: str) -> bytes:
        first = index not in self._begun
        if first and not choice.output_tokens and choice.finish is None:
            return b""  # prompt scores are still coming
        if self._plain and choice.finish is None and not first:
            return self._templates[index].fill(text) if text else b""
        self._begun.add(index)
        made = self._answer.choice(index, text, whole=False, first=first)
        says = made.text or made.finish_reason or made.token_ids or made.prompt_token_ids
        if not says and not (made.logprobs and made.logprobs.tokens):
            return b""
        return sse.frame(wire.encode(self._chunk(made)))

    def closing(self) -> bytes:
        if not self._last_usage:
            return b""
        return sse.frame(wire.encode(self._answer.completion([], with_usage=True)))
