"""/v1/chat/completions on the wire, and what its messages may hold: text."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from fastserve_jax.api.completions import PromptLogprobs
from fastserve_jax.api.sampling import SamplingFields, refuse_unserved
from fastserve_jax.api.usage import StreamOptions, Usage
from fastserve_jax.errors import InvalidRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
MAX_MESSAGES = 4096

ChatTurn = dict[str, object]  # what a chat template is given for one message


class Part(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message, both as sent and as answered."""

    role: str
    content: str | list[Part] | None = None
    refusal: str | None = None
    name: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET
    tool_call_id: str | UnsetType | None = UNSET


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[ChatMessage]
    model: str | None = None  # left out: the one that is served
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: object = None
    add_generation_prompt: bool | None = None
    return_token_ids: bool | None = None
    functions: object = None
    function_call: object = None
    audio: object = None
    modalities: list[str] | None = None
    web_search_options: object = None
    chat_template: object = None
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None

    def check(self) -> None:
        """Refuse what would change the answer and is not served, naming the field."""
        refuse_unserved(self, 1 if self.n is None else self.n)
        refused = {
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none"),
            "audio": self.audio is not None,
            "modalities": self.modalities not in (None, [], ["text"]),
            "web_search_options": self.web_search_options is not None,
            "chat_template": self.chat_template is not None,
            "chat_template_kwargs": bool(self.chat_template_kwargs),
            "continue_final_message": bool(self.continue_final_message),
            "echo": bool(self.echo),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise InvalidRequest(f"{name} is not supported by this server", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        for name in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1", param=name)
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs needs stream: false", param="prompt_logprobs")

    def token_limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def turns(self) -> list[ChatTurn]:
        if not self.messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"at most {MAX_MESSAGES} messages", param="messages")
        return [turn(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


def text_of(content: str | list[Part] | None, where: str) -> str | None:
    """The text of a message's content; raises InvalidRequest for any part that is not text."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in TEXT_PARTS:
            raise InvalidRequest(
                f"content of type {part.type[:40]!r} is not supported: this model reads text only",
                param=f"{where}.content[{i}]",
            )
        if text is None:
            raise InvalidRequest("a text part needs text", param=f"{where}.content[{i}].text")
        texts.append(text)
    return "".join(texts)


def turn(message: ChatMessage, where: str) -> ChatTurn:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"role must be one of {', '.join(sorted(ROLES))}", param=f"{where}.role"
        )
    content = text_of(message.content, where)
    if content is None and message.role != "assistant":
        raise InvalidRequest("content must be text", param=f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    result: ChatTurn = {"role": role, "content": content or ""}
    if isinstance(message.name, str):
        result["name"] = message.name
    if isinstance(message.tool_call_id, str):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message.tool_calls, list):
        result["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
    return result


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str = ""
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    system_fingerprint: str = ""
    usage: Usage | UnsetType | None = UNSET
