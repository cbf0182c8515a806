"""From GGUF metadata to a ModelConfig and the names its tensors go by. Reads no tensor's data,
except the rotary factors that a Llama 3.1 conversion keeps as a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig, RopeScaling
from fastserve_jax.weights.gguf import GgufFile
from fastserve_jax.weights.names import (
    GGUF,
    GGUF_GPT2,
    GGUF_LLAMA,
    GGUF_MIXTRAL,
    GGUF_QWEN3_MOE,
    Names,
)

# What Gemma 3 leaves out of its metadata.
_GEMMA3_LOCAL_BASE = 10_000.0
_GEMMA3_GLOBAL_EVERY = 6
_GEMMA3_27B_LAYERS = 62  # the one size whose attention scale is not from the head's width


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to the fields under the architecture's own prefix."""

    file: GgufFile
    arch: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # written per layer, all alike
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._bad(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._bad(key, value)
        return float(value)

    def optional(self, key: str) -> object:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def _get(self, key: str, default: object) -> object:
        value = self.optional(key)
        if value is None:
            value = default
        if value is None:
            raise ModelFileError(f"{self.file.path}: metadata lacks {self.arch}.{key}")
        return value

    def _bad(self, key: str, value: object) -> ModelFileError:
        return ModelFileError(f"{self.file.path}: {self.arch}.{key} is {repr(value)[:40]}")


def read_config(file: GgufFile) -> tuple[ModelConfig, Names]:
    """Raises ModelFileError for an unknown architecture or a field that is missing or absurd."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _FAMILIES:
        raise ModelFileError(
            f"{file.path}: architecture {arch!r} is not known; these are: "
            + ", ".join(sorted(_FAMILIES))
        )
    build, names = _FAMILIES[arch]
    config = build(_Fields(file, arch))
    if config.family == "mixtral":  # which a file calls a llama
        names = GGUF_MIXTRAL
    return config, names


def _embedding(fields: _Fields) -> tuple[int, int]:
    entry = fields.file.tensors.get("token_embd.weight")
    if entry is None or len(entry.shape) != 2:
        raise ModelFileError(f"{fields.file.path}: no token_embd.weight of two dimensions")
    hidden = fields.integer("embedding_length")
    if entry.shape[1] != hidden:
        raise ModelFileError(
            f"{fields.file.path}: token_embd.weight has shape {entry.shape}, "
            f"embedding_length is {hidden}"
        )
    return entry.shape[0], hidden


def _rotary(fields: _Fields) -> ModelConfig:
    """The part that every family with rotary positions and a gated MLP shares."""
    vocab, hidden = _embedding(fields)
    heads = fields.integer("attention.head_count")
    if not heads:
        raise ModelFileError(f"{fields.file.path}: no attention heads")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise ModelFileError(
                f"{fields.file.path}: {fields.arch}.{key} differs from the head's width {head_dim}"
            )
    return ModelConfig(
        family=fields.arch,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("feed_forward_length"),
        max_context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in fields.file.tensors,
        tied_head="output.weight" not in fields.file.tensors,
        rope_base=fields.number("rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(fields, head_dim),
    )


def _rope_scaling(fields: _Fields, head_dim: int) -> RopeScaling | None:
    kind = fields.optional("rope.scaling.type") or "none"
    if "rope_freqs.weight" in fields.file.tensors:
        return _llama3_scaling(fields, head_dim)
    if kind == "none":
        return None
    if kind != "linear":
        raise ModelFileError(
            f"{fields.file.path}: rope scaling {kind!r} is not supported; linear and llama3 are"
        )
    factor = fields.number("rope.scaling.factor", 1.0)
    return RopeScaling("linear", factor) if factor != 1.0 else None


def _llama3_scaling(fields: _Fields, head_dim: int) -> RopeScaling | None:
    """The scaling whose result rope_freqs.weight records: the divisor of every frequency.

    Conversions keep only that result. Llama 3.1 and later differ in `factor` alone, which is the
    largest divisor, so the rest is put to the test: other numbers would be another formula.
    """
    divisors = fields.file.read("rope_freqs.weight").astype(np.float64)
    if divisors.shape == (head_dim // 2,) and np.all(divisors == 1.0):
        return None
    scaling = RopeScaling("llama3", float(divisors.max()))
    base = fields.number("rope.freq_base", 10_000.0)
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    blend = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - blend) / scaling.factor + blend)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelFileError(
            f"{fields.file.path}: rope_freqs.weight is not the llama3 scaling; not supported"
        )
    return scaling


def _llama(fields: _Fields) -> ModelConfig:
    plain = _rotary(fields)
    return _with_experts(fields, plain, "mixtral") if fields.integer("expert_count", 0) else plain


def _with_experts(fields: _Fields, plain: ModelConfig, family: str) -> ModelConfig:
    """Not the shared ones that some have beside them: their tensors would be left over."""
    inner = fields.integer("expert_feed_forward_length", plain.intermediate_size)
    return replace(
        plain,
        family=family,
        intermediate_size=inner,
        num_experts=fields.integer("expert_count"),
        experts_per_token=fields.integer("expert_used_count"),
    )


def _qwen3_moe(fields: _Fields) -> ModelConfig:
    return replace(_with_experts(fields, _rotary(fields), "qwen3_moe"), qk_norm=True)


def _gemma3(fields: _Fields) -> ModelConfig:
    plain = _rotary(fields)
    window = fields.integer("attention.sliding_window", 0)
    pattern = fields.optional("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == plain.num_layers:
        local = [bool(flag) for flag in pattern]
    else:
        every = pattern if isinstance(pattern, int) and pattern > 0 else _GEMMA3_GLOBAL_EVERY
        local = [(layer + 1) % every != 0 for layer in range(plain.num_layers)]
    wide = plain.num_layers == _GEMMA3_27B_LAYERS
    return replace(
        plain,
        activation="gelu_tanh",
        qk_norm=True,
        sandwich_norms=True,
        windows=tuple(window if is_local else 0 for is_local in local),
        local_rope_base=fields.number("rope.freq_base_swa", _GEMMA3_LOCAL_BASE),
        embedding_scale=math.sqrt(plain.hidden_size),
        attention_scale=(plain.hidden_size / plain.num_heads) ** -0.5 if wide else None,
    )


def _qwen3(fields: _Fields) -> ModelConfig:
    return replace(_rotary(fields), qk_norm=True)


def _gpt2(fields: _Fields) -> ModelConfig:
    vocab, hidden = _embedding(fields)
    heads = fields.integer("attention.head_count")
    if not heads or hidden % heads:
        raise ModelFileError(f"{fields.file.path}: {heads} heads do not divide {hidden}")
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields.integer("feed_forward_length"),
        max_context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_epsilon"),
        layer_norm=True,
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        linear_bias=True,
        tied_head="output.weight" not in fields.file.tensors,
        learned_positions=True,
    )


_FAMILIES: dict[str, tuple[Callable[[_Fields], ModelConfig], Names]] = {
    "llama": (_llama, GGUF_LLAMA),
    "qwen2": (_rotary, GGUF),
    "qwen3": (_qwen3, GGUF),
    "qwen3moe": (_qwen3_moe, GGUF_QWEN3_MOE),
    "gemma3": (_gemma3, GGUF),
    "gpt2": (_gpt2, GGUF_GPT2),
}
