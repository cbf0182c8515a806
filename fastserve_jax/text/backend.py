"""Encoding through the `tokenizers` library, and the leading space its files may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve_jax.text.tokenizer import Encode


@dataclass(frozen=True, slots=True)
class Prefix:
    """A space in front of text, which the encoder adds so that it can also leave it out."""

    space: bool = False
    unless_there: bool = False  # text that begins with a space gets no second one
    after_control: bool = True  # also where a control token stands before the text
    ours: bool = True  # else the library adds it, to every text


def take_prefix(data: dict[str, Any]) -> Prefix:
    """What a tokenizer.json does in front of text; removes it from `data`."""
    for step in _steps(data, "normalizer", "normalizers"):
        if step.get("type") == "Prepend":
            step["prepend"] = ""
            return Prefix(space=True)
    steps = _steps(data, "pre_tokenizer", "pretokenizers")
    if any(step.get("type") == "WhitespaceSplit" for step in steps):  # would take ours away again
        return Prefix(any(step.get("type") == "Metaspace" for step in steps), ours=False)
    for step in steps:
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            step["prepend_scheme"] = "never"
            return Prefix(scheme != "never", unless_there=True, after_control=scheme == "always")
    return Prefix()


def _steps(data: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    step = data.get(key)
    if not isinstance(step, dict):
        return []
    nested = step.get(inner)
    return nested if isinstance(nested, list) else [step]


def build_encoder(backend: Any, prefix: Prefix) -> Encode:
    """An encoder of a `tokenizers.Tokenizer` in which text never matches a control token."""

    def encode(text: str, at_start: bool) -> list[int]:
        text.encode()  # a lone surrogate: the library raises something less telling
        adds = prefix.space and prefix.ours
        if at_start and adds and not (prefix.unless_there and text.startswith(" ")):
            text = " " + text
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return encode
