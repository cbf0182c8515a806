"""The events of a streamed response, the same over SSE and WebSocket, tagged by `type`."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from fastserve_jax.api.responses import OutputLogprob, OutputMessage, OutputText, Response
from fastserve_jax.api.wire import ErrorDetail


class ResponseEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0
    stream_id: str | UnsetType = UNSET  # the WebSocket lane, when the request named one


class Created(ResponseEvent, tag="response.created"):
    response: Response


class InProgress(ResponseEvent, tag="response.in_progress"):
    response: Response


class ItemAdded(ResponseEvent, tag="response.output_item.added"):
    item: OutputMessage
    output_index: int = 0


class PartAdded(ResponseEvent, tag="response.content_part.added"):
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class TextDelta(ResponseEvent, tag="response.output_text.delta"):
    item_id: str
    delta: str
    logprobs: list[OutputLogprob] = msgspec.field(default_factory=list)
    output_index: int = 0
    content_index: int = 0


class TextDone(ResponseEvent, tag="response.output_text.done"):
    item_id: str
    text: str
    logprobs: list[OutputLogprob] = msgspec.field(default_factory=list)
    output_index: int = 0
    content_index: int = 0


class PartDone(ResponseEvent, tag="response.content_part.done"):
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class ItemDone(ResponseEvent, tag="response.output_item.done"):
    item: OutputMessage
    output_index: int = 0


class Completed(ResponseEvent, tag="response.completed"):
    response: Response


class Incomplete(ResponseEvent, tag="response.incomplete"):
    response: Response


class Failed(ResponseEvent, tag="response.failed"):
    response: Response


class SocketError(msgspec.Struct, kw_only=True, tag_field="type", tag="error"):
    """A WebSocket frame refused, or a lane that failed before its response began."""

    status: int
    error: ErrorDetail
    stream_id: str | UnsetType = UNSET


AnyEvent = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | ItemDone
    | Completed
    | Incomplete
    | Failed
)


def event_type(event: ResponseEvent) -> str:
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag
