"""One response of /v1/responses, from its request to its events; SSE and WebSocket both use it.

Knows the store and the engine's side; knows no socket.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from fastserve_jax.api import response_events as ev
from fastserve_jax.api import wire
from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.api.responses import (
    IncompleteDetails,
    InputDetails,
    OutputLogprob,
    OutputMessage,
    OutputText,
    Response,
    ResponseFault,
    ResponseRequest,
    ResponseUsage,
)
from fastserve_jax.api.sampling import top_logprobs
from fastserve_jax.errors import FastServeError, InvalidRequest
from fastserve_jax.server.job import Job, build, encode_chat
from fastserve_jax.server.logprobs import output_logprobs
from fastserve_jax.server.state import ServerState


@dataclass(slots=True)
class ResponseJob:
    state: ServerState
    asked: ResponseRequest
    owner: str
    job: Job
    turns: list[ChatTurn]  # the conversation without instructions, this request's input included
    response: Response
    part: OutputText = field(default_factory=lambda: OutputText(""))
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")

    async def run(self) -> Response:
        """To the end. Raises what the engine raised."""
        (self.part.text,) = await self.job.run()
        (choice,) = self.job.choices
        self.part.logprobs = output_logprobs(self.job.served.tokenizer, choice.take_records())
        return self.finished()

    async def events(self, lane: str | None = None) -> AsyncGenerator[list[ev.ResponseEvent]]:
        """The response's events, those of one moment together, none before the engine's first.

        Raises what the engine raised before that; a later fault becomes response.failed.
        """
        stream_id: str | UnsetType = UNSET if lane is None else lane
        made = _Sequence(self, stream_id)
        (choice,) = self.job.choices
        tokenizer = self.job.served.tokenizer
        try:
            async with self.job.events() as events:
                async for batch in events:
                    shown = list(self.job.shown(events, batch))
                    out = [] if made.count else made.opening()
                    for _, _, text in shown:
                        records = output_logprobs(tokenizer, choice.take_records())
                        if text or records:
                            self.part.text += text
                            self.part.logprobs += records
                            out.append(made.delta(text, records))
                    if out:
                        yield out
        except FastServeError as error:
            if not made.count:
                raise
            self.response.status = "failed"
            self.response.error = ResponseFault("server_error", error.message)
            yield made.failed(self.response)
            return
        yield made.closing()

    def _message(self, status: str) -> OutputMessage:
        return OutputMessage(self.message_id, status, [self.part])

    def finished(self) -> Response:
        """Fills in the response and stores it, if that was asked."""
        (choice,) = self.job.choices
        response, spent = self.response, self.job.usage()
        cut = choice.finish == "length"
        response.status = "incomplete" if cut else "completed"
        if cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.completed_at = int(time.time())
        response.output = [self._message(response.status)]
        cached = spent.prompt_tokens_details.cached_tokens
        response.usage = ResponseUsage(
            spent.prompt_tokens, spent.completion_tokens, spent.total_tokens, InputDetails(cached)
        )
        if response.store:
            self.state.responses.put(
                response.id, wire.encode(response), self.conversation(), self.owner
            )
        return response

    def conversation(self) -> list[ChatTurn]:
        return [*self.turns, {"role": "assistant", "content": self.part.text}]


class _Sequence:
    """Makes the events of one response and numbers them."""

    def __init__(self, job: ResponseJob, stream_id: str | UnsetType) -> None:
        self._job = job
        self._stream_id = stream_id
        self.count = 0

    def _numbered(self, *events: ev.ResponseEvent) -> list[ev.ResponseEvent]:
        for event in events:
            event.sequence_number = self.count
            event.stream_id = self._stream_id
            self.count += 1
        return list(events)

    def opening(self) -> list[ev.ResponseEvent]:
        job = self._job
        item = OutputMessage(job.message_id, "in_progress")
        return self._numbered(
            ev.Created(response=job.response),
            ev.InProgress(response=job.response),
            ev.ItemAdded(item=item),
            ev.PartAdded(item_id=job.message_id, part=OutputText("")),
        )

    def delta(self, text: str, records: list[OutputLogprob]) -> ev.ResponseEvent:
        delta = ev.TextDelta(item_id=self._job.message_id, delta=text, logprobs=records)
        return self._numbered(delta)[0]

    def closing(self) -> list[ev.ResponseEvent]:
        job, part = self._job, self._job.part
        response = job.finished()
        last = ev.Incomplete if response.status == "incomplete" else ev.Completed
        return self._numbered(
            ev.TextDone(item_id=job.message_id, text=part.text, logprobs=part.logprobs),
            ev.PartDone(item_id=job.message_id, part=part),
            ev.ItemDone(item=response.output[0]),
            last(response=response),
        )

    def failed(self, response: Response) -> list[ev.ResponseEvent]:
        return self._numbered(ev.Failed(response=response))


async def response_job(
    state: ServerState,
    asked: ResponseRequest,
    owner: str,
    *,
    timeout_header: str | None = None,
    local: Mapping[str, Sequence[ChatTurn]] | None = None,
) -> ResponseJob:
    """Check `asked` and prepare it. `local`: conversations known to this connection alone.

    Raises InvalidRequest naming the field, or what keeps the server from taking work.
    """
    asked.check()
    served = state.model(asked.model)
    turns = [*_before(state, asked, owner, local or {}), *asked.turns()]
    instructions = asked.instructions
    head: list[ChatTurn] = [{"role": "system", "content": instructions}] if instructions else []
    prompt = await encode_chat(served, head + turns)
    logprobs = top_logprobs("top_logprobs", asked.top_logprobs or 0)
    job = build(
        state,
        served,
        asked,
        [prompt],
        limit=asked.max_output_tokens,
        default_limit=None,
        logprobs=logprobs if asked.wants_logprobs() else None,
        timeout_header=timeout_header,
        owner=owner,
    )
    response = Response(
        id=f"resp_{secrets.token_hex(16)}",
        created_at=int(time.time()),
        status="in_progress",
        model=served.name,
        output=[],
        instructions=instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        previous_response_id=asked.previous_response_id,
        store=asked.store is not False,
        temperature=served.defaults.temperature if asked.temperature is None else asked.temperature,
        tool_choice="none" if asked.tool_choice == "none" else "auto",
        top_p=served.defaults.top_p if asked.top_p is None else asked.top_p,
        top_logprobs=asked.top_logprobs,
    )
    return ResponseJob(state, asked, owner, job, turns, response)


def _before(
    state: ServerState,
    asked: ResponseRequest,
    owner: str,
    local: Mapping[str, Sequence[ChatTurn]],
) -> Sequence[ChatTurn]:
    previous = asked.previous_response_id
    if previous is None:
        return ()
    if previous in local:
        return local[previous]
    stored = state.responses.get(previous, owner)
    if stored is None:
        raise InvalidRequest(
            "previous_response_id names no response kept here",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored.turns
