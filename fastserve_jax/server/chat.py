"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from aiohttp import web
from msgspec import UNSET

from fastserve_jax.api import sse, wire
from fastserve_jax.api.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Delta,
)
from fastserve_jax.api.sampling import top_logprobs
from fastserve_jax.api.usage import usage_wanted
from fastserve_jax.server.choice import Choice
from fastserve_jax.server.chunks import ChunkTemplate
from fastserve_jax.server.exchange import OWNER, STATE, json_answer, read_json
from fastserve_jax.server.job import Job, build, encode_chat
from fastserve_jax.server.logprobs import chat_logprobs, prompt_logprobs
from fastserve_jax.server.streaming import stream_job


async def chat(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, ChatRequest)
    asked.check()
    last_usage, every_usage = usage_wanted(asked.stream, asked.stream_options)
    state = request.app[STATE]
    served = state.model(asked.model)
    tools = asked.tools if asked.tool_choice != "none" else None
    opens_turn = asked.add_generation_prompt is not False
    prompt = await encode_chat(served, asked.turns(), tools, opens_turn)
    logprobs = top_logprobs("top_logprobs", asked.top_logprobs or 0) if asked.logprobs else None
    job = build(
        state,
        served,
        asked,
        [prompt],
        limit=asked.token_limit(),
        default_limit=None,
        logprobs=logprobs,
        timeout_header=request.headers.get("X-Request-Timeout-Ms"),
        owner=request[OWNER],
    )
    answer = _Answer(job, asked, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()))
    if asked.stream:
        return await stream_job(request, job, _Chunks(answer, last_usage, every_usage))
    return json_answer(answer.whole(await job.run()))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the whole answer and every chunk of it have in common."""

    job: Job
    asked: ChatRequest
    id: str
    created: int

    def whole(self, texts: list[str]) -> ChatCompletion:
        job, asked, served = self.job, self.asked, self.job.served
        choices = []
        for index, (text, choice) in enumerate(zip(texts, job.choices, strict=True)):
            assert choice.finish is not None
            made = ChatChoice(index, ChatMessage(role="assistant", content=text), choice.finish)
            if asked.logprobs:
                made.logprobs = chat_logprobs(served.tokenizer, choice.take_records())
            if asked.return_token_ids:
                made.token_ids = choice.take_ids()
            choices.append(made)
        answer = ChatCompletion(self.id, self.created, served.name, choices, job.usage())
        answer.system_fingerprint = served.fingerprint
        if asked.prompt_logprobs is not None:
            scored = job.choices[0].scored
            answer.prompt_logprobs = prompt_logprobs(served.tokenizer, job.prompts[0], scored)
        if asked.return_token_ids:
            answer.prompt_token_ids = job.prompts[0]
        return answer

    def chunk(self, choices: list[ChatChunkChoice], with_usage: bool | None) -> ChatChunk:
        """`with_usage` None leaves the field out, False makes it null."""
        served = self.job.served
        usage = UNSET if with_usage is None else (self.job.usage() if with_usage else None)
        return ChatChunk(
            self.id,
            self.created,
            served.name,
            choices,
            system_fingerprint=served.fingerprint,
            usage=usage,
        )


class _Chunks:
    """Text alone goes through a template; anything more is encoded as it is."""

    def __init__(self, answer: _Answer, last_usage: bool, every_usage: bool) -> None:
        asked = answer.asked
        self._answer = answer
        self._last_usage = last_usage
        self._with_usage = True if every_usage else (False if last_usage else None)
        self._plain = not (asked.logprobs or asked.return_token_ids or every_usage)
        self._templates = [
            ChunkTemplate(lambda text, i=i: self._chunk(i, Delta(content=text)))  # type: ignore[misc]
            for i in range(len(answer.job.choices))
        ]

    def _chunk(self, index: int, delta: Delta, finish: str | None = None) -> ChatChunk:
        choice = ChatChunkChoice(index, delta, finish_reason=finish)
        return self._answer.chunk([choice], self._with_usage)

    def opening(self) -> bytes:
        first = Delta(role="assistant", content="")
        return b"".join(
            sse.frame(wire.encode(self._chunk(i, first))) for i in range(len(self._templates))
        )

    def piece(self, index: int, choice: Choice, text: str) -> bytes:
        if self._plain:
            data = self._templates[index].fill(text) if text else b""
            if choice.finish is None:
                return data
            return data + sse.frame(wire.encode(self._chunk(index, Delta(), choice.finish)))
        made = ChatChunkChoice(index, Delta(content=text) if text else Delta())
        made.finish_reason = choice.finish
        if self._answer.asked.logprobs and (records := choice.take_records()):
            made.logprobs = chat_logprobs(self._answer.job.served.tokenizer, records)
        if self._answer.asked.return_token_ids and (ids := choice.take_ids()):
            made.token_ids = ids
        if not (text or made.finish_reason or made.logprobs or made.token_ids):
            return b""
        return sse.frame(wire.encode(self._answer.chunk([made], self._with_usage)))

    def closing(self) -> bytes:
        if not self._last_usage:
            return b""
        return sse.frame(wire.encode(self._answer.chunk([], with_usage=True)))
