"""From a folder's config.json to a ModelConfig and the names its tensors go by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig, RopeScaling, Seq2SeqConfig
from fastserve_jax.weights.huggingface import read_json
from fastserve_jax.weights.names import (
    HF,
    HF_GEMMA3,
    HF_GPT2,
    HF_MIXTRAL,
    HF_QWEN3_MOE,
    HF_T5,
    Names,
)

_ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_T5_LENGTHS = 4  # a context, in trained lengths: a bias by distance has no end of its own
_GEMMA3_LOCAL_BASE = 10_000.0
_GEMMA3_GLOBAL_EVERY = 6


@dataclass(frozen=True, slots=True)
class _Settings:
    """Typed access to config.json."""

    path: Path
    values: dict[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.bad(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self.positive(key, self._get(key, default))

    def positive(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.bad(key, value)
        return float(value)

    def refuse(self, *keys: str) -> None:
        """These settings change the model in ways that the decoder does not have."""
        for key in keys:
            if self.values.get(key):
                raise ModelFileError(f"{self.path}: {key} = {self.values[key]!r} is not supported")

    def _get(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelFileError(f"{self.path}: {key} is missing")
        return value

    def bad(self, key: str, value: object) -> ModelFileError:
        return ModelFileError(f"{self.path}: {key} is {repr(value)[:40]}")


def read_config_file(path: Path) -> tuple[ModelConfig, Names]:
    """Of a folder's config.json. Raises ModelFileError for an unknown architecture or a setting
    missing or unsupported."""
    settings = _Settings(path, read_json(path))
    listed = settings.values.get("architectures")
    arch = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(arch, str) or arch not in _FAMILIES:
        raise ModelFileError(
            f"{path}: architecture {arch!r} is not known; these are: "
            + ", ".join(sorted(_FAMILIES))
        )
    settings.refuse("quantization_config")
    build, names = _FAMILIES[arch]
    return build(settings), names


def _activation(settings: _Settings, *keys: str) -> str:
    value = next((settings.values[key] for key in keys if settings.values.get(key)), None)
    if value not in _ACTIVATIONS:
        raise ModelFileError(
            f"{settings.path}: activation {value!r} is not known; these are: "
            + ", ".join(_ACTIVATIONS)
        )
    return _ACTIVATIONS[value]


def _rotary(settings: _Settings, family: str) -> ModelConfig:
    """The part that every family with rotary positions and a gated MLP shares."""
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    base, scaling = _rope(settings, "full_attention")
    return ModelConfig(
        family=family,
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=settings.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads", heads),
        head_dim=settings.integer("head_dim", hidden // heads),
        intermediate_size=settings.integer("intermediate_size"),
        max_context=settings.integer("max_position_embeddings"),
        norm_eps=settings.number("rms_norm_eps"),
        activation=_activation(settings, "hidden_activation", "hidden_act"),
        tied_head=bool(settings.values.get("tie_word_embeddings", False)),
        rope_base=base,
        rope_scaling=scaling,
    )


def _rope(settings: _Settings, layer_type: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (flat, or per layer type) or the older keys."""
    parameters = settings.values.get("rope_parameters")
    if not isinstance(parameters, dict):
        old = settings.values.get("rope_scaling")
        base = settings.number("rope_theta", 10_000.0)
        return base, _scaling(settings, old if isinstance(old, dict) else {})
    nested = parameters.get(layer_type)
    chosen = nested if isinstance(nested, dict) else parameters
    theta = chosen.get("rope_theta", settings.values.get("rope_theta", 10_000.0))
    return settings.positive("rope_theta", theta), _scaling(settings, chosen)


def _scaling(settings: _Settings, scaling: dict[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind == "default":
        return None

    def value(key: str) -> float:
        return settings.positive(f"rope scaling's {key}", scaling.get(key))

    if kind == "linear":
        return RopeScaling("linear", value("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            value("factor"),
            value("low_freq_factor"),
            value("high_freq_factor"),
            int(value("original_max_position_embeddings")),
        )
    raise ModelFileError(
        f"{settings.path}: rope scaling {kind!r} is not supported; linear and llama3 are"
    )


def _windows(settings: _Settings, layers: int, otherwise: Callable[[int], bool]) -> tuple[int, ...]:
    """Each layer's window: by `layer_types` where given, else where `otherwise(layer)` says."""
    if not settings.values.get("sliding_window"):
        return ()
    window = settings.integer("sliding_window")
    types = settings.values.get("layer_types")
    if types is None:
        local = [otherwise(layer) for layer in range(layers)]
    elif isinstance(types, list) and len(types) == layers:
        local = [kind == "sliding_attention" for kind in types]
    else:
        raise settings.bad("layer_types", types)
    return tuple(window if is_local else 0 for is_local in local) if any(local) else ()


def _llama(settings: _Settings) -> ModelConfig:
    settings.refuse("attention_bias", "mlp_bias")
    return _rotary(settings, "llama")


def _mistral(settings: _Settings) -> ModelConfig:
    plain = _rotary(settings, "llama")
    return replace(plain, windows=_windows(settings, plain.num_layers, lambda layer: True))


def _qwen(settings: _Settings, family: str) -> ModelConfig:
    plain = _rotary(settings, family)
    if not settings.values.get("use_sliding_window"):
        return plain
    first = settings.values.get("max_window_layers") or 0
    return replace(
        plain, windows=_windows(settings, plain.num_layers, lambda layer: layer >= first)
    )


def _qwen2(settings: _Settings) -> ModelConfig:
    return replace(_qwen(settings, "qwen2"), qkv_bias=True)


def _qwen3(settings: _Settings) -> ModelConfig:
    settings.refuse("attention_bias")
    return replace(_qwen(settings, "qwen3"), qk_norm=True)


def _mixtral(settings: _Settings) -> ModelConfig:
    return replace(
        _mistral(settings),
        family="mixtral",
        num_experts=settings.integer("num_local_experts"),
        experts_per_token=settings.integer("num_experts_per_tok"),
    )


def _qwen3_moe(settings: _Settings) -> ModelConfig:
    """Every layer has experts, as all that are published do."""
    settings.refuse("mlp_only_layers")
    if settings.integer("decoder_sparse_step", 1) != 1:
        raise settings.bad("decoder_sparse_step", settings.values["decoder_sparse_step"])
    return replace(
        _qwen3(settings),
        family="qwen3_moe",
        intermediate_size=settings.integer("moe_intermediate_size"),
        num_experts=settings.integer("num_experts"),
        experts_per_token=settings.integer("num_experts_per_tok"),
        norm_topk=bool(settings.values.get("norm_topk_prob", False)),
    )


def _gemma3(settings: _Settings) -> ModelConfig:
    settings.refuse("attention_bias", "attn_logit_softcapping", "final_logit_softcapping")
    settings.refuse("use_bidirectional_attention")
    plain = _rotary(settings, "gemma3")
    every = settings.integer("sliding_window_pattern", _GEMMA3_GLOBAL_EVERY)
    windows = _windows(settings, plain.num_layers, lambda layer: (layer + 1) % every != 0)
    local_base = settings.number("rope_local_base_freq", _GEMMA3_LOCAL_BASE)
    if isinstance(settings.values.get("rope_parameters"), dict):
        local_base, _ = _rope(settings, "sliding_attention")
    scalar = settings.number("query_pre_attn_scalar", plain.head_dim)
    return replace(
        plain,
        qk_norm=True,
        sandwich_norms=True,
        tied_head=bool(settings.values.get("tie_word_embeddings", True)),
        windows=windows,
        local_rope_base=local_base,
        embedding_scale=math.sqrt(plain.hidden_size),
        attention_scale=None if scalar == plain.head_dim else scalar**-0.5,
    )


def _gpt2(settings: _Settings) -> ModelConfig:
    settings.refuse("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    hidden, heads = settings.integer("n_embd"), settings.integer("n_head")
    if hidden % heads:
        raise ModelFileError(f"{settings.path}: {heads} heads do not divide n_embd {hidden}")
    return ModelConfig(
        family="gpt2",
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=settings.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=settings.integer("n_inner", 4 * hidden),
        max_context=settings.integer("n_positions"),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        layer_norm=True,
        activation=_activation(settings, "activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        linear_bias=True,
        tied_head=bool(settings.values.get("tie_word_embeddings", True)),
        learned_positions=True,
    )


def _t5(settings: _Settings) -> ModelConfig:
    values = settings.values
    kind = values.get("feed_forward_proj", "relu")
    gated, _, activation = str(kind).rpartition("-")
    named = {"relu": "relu", "gelu_new": "gelu_tanh", "silu": "silu"}
    if gated:  # without, transformers' gelu is the exact one
        named["gelu"] = "gelu_tanh"
    if gated not in ("", "gated") or activation not in named:
        raise settings.bad("feed_forward_proj", kind)
    start = values.get("decoder_start_token_id", values.get("pad_token_id", 0))
    if not isinstance(start, int) or not 0 <= start < settings.integer("vocab_size"):
        raise settings.bad("decoder_start_token_id", start)
    heads, layers = settings.integer("num_heads"), settings.integer("num_layers")
    buckets = settings.integer("relative_attention_num_buckets", 32)
    farthest = settings.integer("relative_attention_max_distance", 128)
    if buckets % 4 or farthest <= buckets // 2:
        raise settings.bad("relative_attention_num_buckets", buckets)
    trained = settings.integer("n_positions", 512)
    # Transformers from 5 on call every T5 tied, and say apart what that was.
    scaled = bool(values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)))
    return Seq2SeqConfig(
        family="t5",
        vocab_size=settings.integer("vocab_size"),
        hidden_size=settings.integer("d_model"),
        num_layers=settings.integer("num_decoder_layers", layers),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=settings.integer("d_kv"),
        intermediate_size=settings.integer("d_ff"),
        max_context=_T5_LENGTHS * trained,
        norm_eps=settings.number("layer_norm_epsilon", 1e-6),
        activation=named[activation],
        gated_mlp=gated == "gated",
        tied_head=scaled,
        encoder_layers=layers,
        position_buckets=buckets,
        farthest=farthest,
        start_token=start,
        trained_tokens=trained,
        scaled_head=scaled,
    )


_FAMILIES: dict[str, tuple[Callable[[_Settings], ModelConfig], Names]] = {
    "LlamaForCausalLM": (_llama, HF),
    "MistralForCausalLM": (_mistral, HF),
    "MixtralForCausalLM": (_mixtral, HF_MIXTRAL),
    "Qwen3MoeForCausalLM": (_qwen3_moe, HF_QWEN3_MOE),
    "Qwen2ForCausalLM": (_qwen2, HF),
    "Qwen3ForCausalLM": (_qwen3, HF),
    "Gemma3ForCausalLM": (_gemma3, HF_GEMMA3),
    "GPT2LMHeadModel": (_gpt2, HF_GPT2),
    "T5ForConditionalGeneration": (_t5, HF_T5),
    "T5WithLMHeadModel": (_t5, HF_T5),
    "MT5ForConditionalGeneration": (_t5, HF_T5),
}


_ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_sampling(folder: Path) -> Mapping[str, float]:
    """What generation_config.json advises for sampling; nothing where it says not to sample."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    values = read_json(path)
    if values.get("do_sample") is False:
        return {}
    settings = _Settings(path, values)
    return {key: settings.positive(key, values[key]) for key in _ADVISED if values.get(key)}
