"""The small routes on the wire: models and their loading, tokenize, detokenize, tokenizer_info,
version, health."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from fastserve_jax.api.chat import ChatMessage


class ModelCard(msgspec.Struct):
    id: str
    created: int  # unix seconds
    object: str = "model"
    owned_by: str = "fastserve"
    root: str | UnsetType = UNSET  # which model or version that is, or where an adapter was read
    parent: str | UnsetType = UNSET  # of an adapter: the model that it is beside
    max_model_len: int | UnsetType = UNSET  # tokens, prompt and output together


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


class Loading(msgspec.Struct, kw_only=True):
    model: str  # as for `fastserve serve`
    name: str | None = None  # that clients will call it by; where another has it, in its place


class Unloading(msgspec.Struct, kw_only=True):
    model: str  # the name that clients call it by


class AdapterLoading(msgspec.Struct, kw_only=True):
    lora_name: str = ""  # that clients will call it by
    lora_path: str = ""  # a folder in PEFT's format, or a registered adapter
    base_model_name: str | None = None  # None: the first model that is served


class AdapterUnloading(msgspec.Struct, kw_only=True):
    lora_name: str = ""


class Unloaded(msgspec.Struct):
    id: str
    unloaded: bool = True


class TokenizeRequest(msgspec.Struct, kw_only=True):
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    max_model_len: int


class Version(msgspec.Struct):
    version: str


class Health(msgspec.Struct):
    status: str
