"""/v1/responses on the wire: the request, its input items, and the Response object. Text only."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from fastserve_jax.api.chat import ROLES, ChatTurn, Part, TopLogprob, text_of
from fastserve_jax.api.sampling import SamplingFields, refuse_unserved
from fastserve_jax.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"  # asked for in `include`
MAX_ITEMS = 4096
STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")


class InputItem(msgspec.Struct, kw_only=True):
    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    type: str = "text"


class TextSettings(msgspec.Struct, kw_only=True):
    format: TextFormat | None = msgspec.field(default_factory=TextFormat)


class ResponseRequest(SamplingFields, kw_only=True):
    input: str | list[InputItem]
    model: str | None = None  # left out: the one that is served
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: object = None
    prompt: object = None

    def check(self) -> None:
        """Refuse what would change the answer and is not served, naming the field."""
        if self.n not in (None, 1):
            raise InvalidRequest("a response has one output", param="n")
        refuse_unserved(self, 1)
        form = self.text.format.type if self.text and self.text.format else "text"
        refused = {
            "text.format": form != "text",
            "tools": bool(self.tools) and self.tool_choice != "none",
            "tool_choice": self.tool_choice not in (None, "auto", "none"),
            "truncation": self.truncation not in (None, "disabled"),
            "background": bool(self.background),
            "conversation": self.conversation is not None,
            "prompt": self.prompt is not None,
            "prompt_logprobs": self.prompt_logprobs is not None,
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise InvalidRequest(f"{name} is not supported by this server", param=name)
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequest("max_output_tokens must be at least 1", param="max_output_tokens")
        self._check_metadata()

    def _check_metadata(self) -> None:
        metadata = self.metadata or {}
        if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
            raise InvalidRequest(
                "metadata holds at most 16 pairs, keys of 64 and values of 512 characters",
                param="metadata",
            )

    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def turns(self) -> list[ChatTurn]:
        """The request's own messages, without instructions and without what came before."""
        if isinstance(self.input, str):
            if not self.input:
                raise InvalidRequest("input must not be empty", param="input")
            return [{"role": "user", "content": self.input}]
        if not self.input:
            raise InvalidRequest("input must not be empty", param="input")
        if len(self.input) > MAX_ITEMS:
            raise InvalidRequest(f"input holds at most {MAX_ITEMS} items", param="input")
        return [_turn(item, f"input[{i}]") for i, item in enumerate(self.input)]


def _turn(item: InputItem, where: str) -> ChatTurn:
    if item.type != "message":
        raise InvalidRequest(
            f"input items of type {item.type[:40]!r} are not supported", param=f"{where}.type"
        )
    if item.role not in ROLES - {"tool", "function"}:
        raise InvalidRequest(
            "role must be user, assistant, system or developer", param=f"{where}.role"
        )
    content = text_of(item.content, where)
    if content is None:
        raise InvalidRequest("content must be text", param=f"{where}.content")
    return {"role": "system" if item.role == "developer" else item.role, "content": content}


class SocketRequest(ResponseRequest, kw_only=True):
    """A client's WebSocket frame: a response request without stream or background."""

    type: str
    stream_id: str | None = None

    def check_lane(self) -> None:
        if self.type != "response.create":
            raise InvalidRequest("the only frame served is response.create", param="type")
        if self.stream_id is not None and not STREAM_ID.fullmatch(self.stream_id):
            raise InvalidRequest("stream_id has 1 to 256 of A-Z a-z 0-9 _ . -", param="stream_id")


class OutputLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[object] = msgspec.field(default_factory=list)
    logprobs: list[OutputLogprob] = msgspec.field(default_factory=list)


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: str
    content: list[OutputText] = msgspec.field(default_factory=list)
    role: str = "assistant"


class InputDetails(msgspec.Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)


class ResponseFault(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class Response(msgspec.Struct, kw_only=True):
    id: str
    created_at: int
    completed_at: int | None = None
    status: str
    model: str
    output: list[OutputMessage]
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = True
    temperature: float
    text: TextSettings = msgspec.field(default_factory=TextSettings)
    tool_choice: str = "auto"
    tools: list[Any] = msgspec.field(default_factory=list)
    top_logprobs: int | None = None
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | UnsetType = UNSET
    object: str = "response"

    @property
    def output_text(self) -> str:
        return "".join(part.text for item in self.output for part in item.content)


class DeletedResponse(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True
