"""Which stored tensors make up each of the decoder's parameters: one table per source format.

A parameter is its stored tensors, each transformed where needed, stacked along the first axis.
Linear weights are [out, in]. Tables speak of stems: `.weight` and `.bias` carry over, and {i} is
the layer. An expert's matrix is stored [out, in] and ours [in, out]. Opens no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.models.config import ModelConfig

Transform = Callable[[NDArray[Any], ModelConfig], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Names:
    """A source format. `transforms` is keyed by stored stem; `unused` may be left over."""

    parts: Mapping[str, tuple[str, ...]]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # endings of stored names that carry no parameter
    # Stems of experts' matrices, [out, in] each: all behind each other, or with {e} one by one.
    experts: tuple[str, ...] = ()


def _halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """From interleaved rotary pairs (2i, 2i + 1) within each head to rotate-half order."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def halves_back(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """From rotate-half order to interleaved pairs."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _query_halves(rows: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    return _halves(rows, config.num_heads)


def _key_halves(rows: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    return _halves(rows, config.num_kv_heads)


def _transposed(weight: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    return weight.T if weight.ndim == 2 else weight


def _plus_one(weight: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    return weight.astype(np.float32) + np.float32(1)


_GGUF_PARTS = {
    "embed": ("token_embd",),
    "positions": ("position_embd",),
    "layers.{i}.attn_norm": ("blk.{i}.attn_norm",),
    "layers.{i}.attn.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "layers.{i}.attn.q_norm": ("blk.{i}.attn_q_norm",),
    "layers.{i}.attn.k_norm": ("blk.{i}.attn_k_norm",),
    "layers.{i}.attn.out": ("blk.{i}.attn_output",),
    "layers.{i}.post_attn_norm": ("blk.{i}.post_attention_norm",),
    "layers.{i}.mlp_norm": ("blk.{i}.ffn_norm",),
    "layers.{i}.mlp.gate_up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.up": ("blk.{i}.ffn_up",),
    "layers.{i}.mlp.down": ("blk.{i}.ffn_down",),
    "layers.{i}.post_mlp_norm": ("blk.{i}.post_ffw_norm",),
    "final_norm": ("output_norm",),
    "head": ("output",),
}
_GGUF_EXPERTS = {
    "layers.{i}.mlp.router": ("blk.{i}.ffn_gate_inp",),
    "layers.{i}.mlp.gate": ("blk.{i}.ffn_gate_exps",),
    "layers.{i}.mlp.up": ("blk.{i}.ffn_up_exps",),
    "layers.{i}.mlp.down": ("blk.{i}.ffn_down_exps",),
}
_GGUF_UNUSED = ("rope_freqs.weight", ".attn_rot_embd.weight")

GGUF = Names(_GGUF_PARTS, unused=_GGUF_UNUSED)
GGUF_LLAMA = Names(
    _GGUF_PARTS,
    {"blk.{i}.attn_q": _query_halves, "blk.{i}.attn_k": _key_halves},
    _GGUF_UNUSED,
)
GGUF_GPT2 = Names(_GGUF_PARTS | {"layers.{i}.attn.qkv": ("blk.{i}.attn_qkv",)})

_EXPERT_MATRICES = tuple(stem for name, (stem,) in _GGUF_EXPERTS.items() if "router" not in name)
GGUF_QWEN3_MOE = Names(_GGUF_PARTS | _GGUF_EXPERTS, unused=_GGUF_UNUSED, experts=_EXPERT_MATRICES)
GGUF_MIXTRAL = Names(
    _GGUF_PARTS | _GGUF_EXPERTS, GGUF_LLAMA.transforms, _GGUF_UNUSED, _EXPERT_MATRICES
)

_LAYER = "model.layers.{i}."
_HF_PARTS = {
    "embed": ("model.embed_tokens",),
    "layers.{i}.attn_norm": (_LAYER + "input_layernorm",),
    "layers.{i}.attn.qkv": (
        _LAYER + "self_attn.q_proj",
        _LAYER + "self_attn.k_proj",
        _LAYER + "self_attn.v_proj",
    ),
    "layers.{i}.attn.q_norm": (_LAYER + "self_attn.q_norm",),
    "layers.{i}.attn.k_norm": (_LAYER + "self_attn.k_norm",),
    "layers.{i}.attn.out": (_LAYER + "self_attn.o_proj",),
    "layers.{i}.mlp_norm": (_LAYER + "post_attention_layernorm",),
    "layers.{i}.mlp.gate_up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
    "layers.{i}.mlp.down": (_LAYER + "mlp.down_proj",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
}
_GEMMA3_NORMS = {
    "layers.{i}.post_attn_norm": (_LAYER + "post_attention_layernorm",),
    "layers.{i}.mlp_norm": (_LAYER + "pre_feedforward_layernorm",),
    "layers.{i}.post_mlp_norm": (_LAYER + "post_feedforward_layernorm",),
}
_GEMMA3_PARTS = _HF_PARTS | _GEMMA3_NORMS
_BLOCK = "transformer.h.{i}."
_HF_UNUSED = (".rotary_emb.inv_freq",)


def _with_experts(block: str, gate: str, up: str, down: str) -> Names:
    """Of a folder that calls a layer's block and an expert's matrices so."""
    stems = {
        "router": f"{_LAYER}{block}.gate",
        "gate": f"{_LAYER}{block}.experts.{{e}}.{gate}",
        "up": f"{_LAYER}{block}.experts.{{e}}.{up}",
        "down": f"{_LAYER}{block}.experts.{{e}}.{down}",
    }
    parts = {f"layers.{{i}}.mlp.{name}": (stem,) for name, stem in stems.items()}
    experts = tuple(stem for name, stem in stems.items() if name != "router")
    return Names(_HF_PARTS | parts, unused=_HF_UNUSED, experts=experts)


HF = Names(_HF_PARTS, unused=_HF_UNUSED)
HF_MIXTRAL = _with_experts("block_sparse_moe", "w1", "w3", "w2")
HF_QWEN3_MOE = _with_experts("mlp", "gate_proj", "up_proj", "down_proj")
HF_GEMMA3 = Names(
    _GEMMA3_PARTS,
    {stored: _plus_one for ours, (stored, *_) in _GEMMA3_PARTS.items() if ours.endswith("norm")},
    _HF_UNUSED,
)
HF_GPT2 = Names(
    {
        "embed": ("transformer.wte",),
        "positions": ("transformer.wpe",),
        "layers.{i}.attn_norm": (_BLOCK + "ln_1",),
        "layers.{i}.attn.qkv": (_BLOCK + "attn.c_attn",),
        "layers.{i}.attn.out": (_BLOCK + "attn.c_proj",),
        "layers.{i}.mlp_norm": (_BLOCK + "ln_2",),
        "layers.{i}.mlp.up": (_BLOCK + "mlp.c_fc",),
        "layers.{i}.mlp.down": (_BLOCK + "mlp.c_proj",),
        "final_norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
    # Conv1D keeps its weight as [in, out]
    {
        _BLOCK + stem: _transposed
        for stem in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    (".attn.bias", ".attn.masked_bias"),  # the causal mask, kept as a buffer
)

HF_OF_FAMILY: Mapping[str, Names] = {
    "llama": HF,
    "qwen2": HF,
    "qwen3": HF,
    "gemma3": HF_GEMMA3,
    "gpt2": HF_GPT2,
    "mixtral": HF_MIXTRAL,
    "qwen3_moe": HF_QWEN3_MOE,
}


def _t5(stack: str, layers: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Of a stack whose blocks have those layers, by our name for each kind."""
    block = f"{stack}.block.{{i}}."
    parts: dict[str, tuple[str, ...]] = {}
    for kind, layer in layers.items():
        names = {part: f"{block}{layer}.{part}" for part in ("q", "k", "v", "o")}
        if kind == "attn":
            parts["qkv"] = (names["q"], names["k"], names["v"])
            parts["out"] = (names["o"],)
        elif kind == "cross":
            parts["cross_q"], parts["cross_kv"] = (names["q"],), (names["k"], names["v"])
            parts["cross_out"] = (names["o"],)
        else:
            parts["mlp.gate_up"] = (f"{block}{layer}.wi_0", f"{block}{layer}.wi_1")
            parts["mlp.up"], parts["mlp.down"] = (f"{block}{layer}.wi",), (f"{block}{layer}.wo",)
        parts[f"{kind}_norm"] = (f"{block}{layer.rpartition('.')[0]}.layer_norm",)
    found = {f"{stack}.{{i}}.{name}": stored for name, stored in parts.items()}
    first = f"{stack}.block.0.{layers['attn']}.relative_attention_bias"
    return found | {f"{stack}_bias": (first,)}


HF_T5 = Names(
    {
        "embed": ("shared",),
        "encoder_norm": ("encoder.final_layer_norm",),
        "final_norm": ("decoder.final_layer_norm",),
        "head": ("lm_head",),
        **_t5("encoder", {"attn": "layer.0.SelfAttention", "mlp": "layer.1.DenseReluDense"}),
        **_t5(
            "decoder",
            {
                "attn": "layer.0.SelfAttention",
                "cross": "layer.1.EncDecAttention",
                "mlp": "layer.2.DenseReluDense",
            },
        ),
    },
    # Copies of the embedding; and a bias of cross-attention that was never used.
    unused=(".embed_tokens.weight", ".EncDecAttention.relative_attention_bias.weight"),
)

# As the decoder has them, and experts' matrices [in, out].
CANONICAL = Names({name: (name,) for name in {**_GGUF_PARTS, **_GGUF_EXPERTS}})
