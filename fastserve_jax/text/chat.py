"""Conversations to prompts, by the model's own template.

What a user wrote never becomes a control token: see `ChatTemplate.encode`. Reads no clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from jinja2.exceptions import TemplateError

from fastserve_jax.errors import InvalidRequest
from fastserve_jax.text.matching import first_of
from fastserve_jax.text.sandbox import Sandbox
from fastserve_jax.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 256 << 10
_MAX_DEPTH = 32
_PRIVATE_USE = range(0xE000, 0xF900)

# For models that were never taught a format: turns as lines, which they continue.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatTemplate:
    """The template of a model, or PLAIN_TEMPLATE for a model without one.

    A template that cannot be compiled fails requests, not the model: completions still work.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self.source = source or tokenizer.chat_template or PLAIN_TEMPLATE
        self._tokenizer = tokenizer
        self._break = _breaker(tuple(tokenizer.control_texts))
        try:
            if len(self.source) > MAX_TEMPLATE_CHARS:
                raise TemplateError(f"longer than {MAX_TEMPLATE_CHARS} characters")
            self._code = Sandbox().compile_metered(self.source)
            self._broken = ""
        except Exception as error:  # a template is input: whatever is wrong with it, say so
            self._broken = _reason(error)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text. Raises InvalidRequest for messages that the template refuses."""
        text, sentinel = self._rendered(messages, tools, add_generation_prompt)
        return text.replace(sentinel, "")

    def encode(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as tokens; control tokens come from the template alone.

        Wherever given text reads like a control token, or could with what follows it, a
        character that occurs nowhere else is put inside before rendering, and is taken out after
        the result has been split at the control tokens that are still whole.
        """
        text, sentinel = self._rendered(messages, tools, add_generation_prompt)
        return self._tokenizer.encode_template(text, sentinel)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
    ) -> tuple[str, str]:
        if self._broken:
            raise InvalidRequest(f"this model's chat template cannot be used: {self._broken}")
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        given = [_for_template(message) for message in messages]
        sentinel = _absent_character(json.dumps([given, tools], ensure_ascii=False), self.source)

        def broken(text: str) -> str:
            return self._break(text, sentinel)

        variables = {
            **self._tokenizer.named_tokens,
            "messages": _each_text(given, broken),
            "tools": _each_text(tools, broken) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return Sandbox().run(self._code, variables), sentinel
        except Exception as error:  # a template may fail in any way that Python knows
            raise InvalidRequest(
                f"the chat template does not take these messages: {_reason(error)}",
                param="messages",
            ) from error


def _for_template(message: Mapping[str, object]) -> dict[str, object]:
    """A message in the form that templates are written for."""
    shaped = dict(message)
    content = message.get("content")
    if content is None:
        shaped["content"] = ""
    elif isinstance(content, list | tuple):
        shaped["content"] = "\n".join(map(_part_text, content))
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple):
        shaped["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return shaped


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise InvalidRequest("content may only have text parts", param="messages")
    return text


def _with_parsed_arguments(call: object) -> object:
    """Clients send a call's arguments as JSON text; templates want the object."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _each_text(value: object, change: Callable[[str], str], depth: int = 0) -> object:
    """The same structure with every string changed, keys included."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"messages nest deeper than {_MAX_DEPTH}", param="messages")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: _each_text(item, change, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_each_text(item, change, depth + 1) for item in value]
    return value


def _breaker(controls: Sequence[str]) -> Callable[[str, str], str]:
    """A function that puts a sentinel behind the first letter of every control token in a text,
    and of every beginning of one at its end, which the text that follows could complete.

    Case is ignored and spaces at the end are looked past: a template may lower or trim.
    """
    if not controls:
        return lambda text, sentinel: text
    whole = re.compile(first_of(text.lower() for text in controls), re.IGNORECASE)
    beginnings = {text[:end].lower() for text in controls for end in range(1, len(text))}
    longest = max(map(len, beginnings))

    def broken(text: str, sentinel: str) -> str:
        kept = text.rstrip()
        marks = {match.end() for match in whole.finditer(text)}
        for length in range(1, min(longest, len(kept)) + 1):
            if kept[-length:].lower() in beginnings:
                marks.add(len(kept) - length + 1)
        cuts = [0, *sorted(marks), len(text)]
        return sentinel.join(text[at:end] for at, end in pairwise(cuts))

    return broken


def _absent_character(*texts: str) -> str:
    for code in _PRIVATE_USE:
        if not any(chr(code) in text for text in texts):
            return chr(code)
    raise InvalidRequest("messages use every private-use character", param="messages")


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text[:300]
