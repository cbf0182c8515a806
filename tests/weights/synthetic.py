"""Tiny models of every family: the canonical parameters, and how each format stores them.

The stored forms are derived from the canonical ones by what the converters of each format do, so
a loader is right when it gives the canonical parameters back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCAB, CONTEXT, LAYERS = 64, 4, 2, 32, 96, 48, 128, 2
EXPERTS, CHOSEN = 4, 2
WITH_EXPERTS = ("mixtral", "qwen3_moe")
Arrays = dict[str, np.ndarray[Any, Any]]


def parameters(family: str, *, tied: bool = True, seed: int = 0) -> Arrays:
    """Random canonical parameters, every one different."""
    rng = np.random.default_rng(seed)
    gpt2 = family == "gpt2"
    kv_heads, head = (HEADS, HIDDEN // HEADS) if gpt2 else (KV_HEADS, HEAD)
    rows = (HEADS + 2 * kv_heads) * head
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCAB, HIDDEN)}
    if gpt2:
        shapes["positions.weight"] = (CONTEXT, HIDDEN)
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        shapes[at + "attn_norm.weight"] = shapes[at + "mlp_norm.weight"] = (HIDDEN,)
        shapes[at + "attn.qkv.weight"] = (rows, HIDDEN)
        shapes[at + "attn.out.weight"] = (HIDDEN, HEADS * head)
        if family in WITH_EXPERTS:
            shapes[at + "mlp.router.weight"] = (EXPERTS, HIDDEN)
            shapes[at + "mlp.gate.weight"] = (EXPERTS, HIDDEN, FFN)
            shapes[at + "mlp.up.weight"] = (EXPERTS, HIDDEN, FFN)
            shapes[at + "mlp.down.weight"] = (EXPERTS, FFN, HIDDEN)
        else:
            shapes[at + "mlp.down.weight"] = (HIDDEN, FFN)
            shapes[at + ("mlp.up.weight" if gpt2 else "mlp.gate_up.weight")] = (
                (FFN, HIDDEN) if gpt2 else (2 * FFN, HIDDEN)
            )
        if family in ("qwen2", "gpt2"):
            shapes[at + "attn.qkv.bias"] = (rows,)
        if family in ("qwen3", "gemma3", "qwen3_moe"):
            shapes[at + "attn.q_norm.weight"] = shapes[at + "attn.k_norm.weight"] = (HEAD,)
        if family == "gemma3":
            shapes[at + "post_attn_norm.weight"] = (HIDDEN,)
            shapes[at + "post_mlp_norm.weight"] = (HIDDEN,)
        if gpt2:
            for name, size in (("attn.out", HIDDEN), ("mlp.up", FFN), ("mlp.down", HIDDEN)):
                shapes[at + name + ".bias"] = (size,)
            for name in ("attn_norm", "mlp_norm"):
                shapes[at + name + ".bias"] = (HIDDEN,)
    shapes["final_norm.weight"] = (HIDDEN,)
    if gpt2:
        shapes["final_norm.bias"] = (HIDDEN,)
    if not tied:
        shapes["head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What a llama conversion does to query and key rows: halves become pairs."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def split_rows(array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return np.split(array, [HEADS * HEAD, (HEADS + KV_HEADS) * HEAD])


def gguf_tensors(family: str, arrays: Arrays) -> Arrays:
    """The same parameters under the names and in the order of a GGUF file."""
    plain = {
        "attn_norm": "attn_norm",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "attn.out": "attn_output",
        "post_attn_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
        "post_mlp_norm": "post_ffw_norm",
    }
    outer = {
        "embed": "token_embd",
        "positions": "position_embd",
        "final_norm": "output_norm",
        "head": "output",
    }
    stored: Arrays = {}
    for name, array in arrays.items():
        stem, _, ending = name.rpartition(".")
        if not stem.startswith("layers."):
            stored[f"{outer[stem]}.{ending}"] = array
            continue
        _, layer, kind = stem.split(".", 2)
        at = f"blk.{layer}."
        if array.ndim == 3:
            stored[f"{at}ffn_{kind.removeprefix('mlp.')}_exps.{ending}"] = array.swapaxes(1, 2)
        elif kind == "mlp.router":
            stored[f"{at}ffn_gate_inp.{ending}"] = array
        elif kind == "attn.qkv" and family == "gpt2":
            stored[f"{at}attn_qkv.{ending}"] = array
        elif kind == "attn.qkv":
            q, k, v = split_rows(array)
            if family in ("llama", "mixtral"):
                q, k = interleaved(q, HEADS), interleaved(k, KV_HEADS)
            stored |= {
                f"{at}attn_{n}.{ending}": part for n, part in zip("qkv", (q, k, v), strict=True)
            }
        elif kind == "mlp.gate_up":
            gate, up = np.split(array, 2)
            stored |= {f"{at}ffn_gate.{ending}": gate, f"{at}ffn_up.{ending}": up}
        else:
            stored[f"{at}{plain[kind]}.{ending}"] = array
    return stored


def write_gguf(
    path: Path,
    family: str,
    tensors: Arrays,
    *,
    quantised: gguf.GGMLQuantizationType | None = None,
    fields: dict[str, Any] | None = None,
) -> Path:
    """Writes a GGUF with `tensors`; two-dimensional ones as `quantised`. `fields` override the
    architecture's own, None taking one out."""
    arch = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    norm = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        f"attention.{norm}": 1e-5,
    }
    if family != "gpt2":
        values |= {
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD,
            "rope.freq_base": 50_000.0,
        }
    if family == "gemma3":
        values["attention.sliding_window"] = 16
    if family in WITH_EXPERTS:
        values |= {"expert_count": EXPERTS, "expert_used_count": CHOSEN}
    if family == "qwen3_moe":  # whose other size is of layers without experts, of which it has none
        values |= {"expert_feed_forward_length": FFN, "feed_forward_length": 7 * FFN}
    for key, value in (values | (fields or {})).items():
        name = f"{arch}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    writer.add_string("general.license", "mit")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, array in tensors.items():
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder_tensors(family: str, arrays: Arrays) -> Arrays:
    """The same parameters as a Hugging Face checkpoint holds them."""
    norms = {
        "attn_norm": "input_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.down": "mlp.down_proj",
    }
    if family == "gemma3":
        norms["post_attn_norm"] = "post_attention_layernorm"
        norms["mlp_norm"] = "pre_feedforward_layernorm"
        norms["post_mlp_norm"] = "post_feedforward_layernorm"
    outer = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    stored: Arrays = {}
    for name, array in arrays.items():
        stem, _, ending = name.rpartition(".")
        if family == "gemma3" and "norm" in stem:
            array = array - np.float32(1)
        if not stem.startswith("layers."):
            stored[f"{outer[stem]}.{ending}"] = array
            continue
        _, layer, kind = stem.split(".", 2)
        at = f"model.layers.{layer}."
        if kind == "mlp.router" or array.ndim == 3:
            stored |= experts_in_folder(family, at, kind.removeprefix("mlp."), array)
        elif kind == "attn.qkv":
            for part, rows in zip("qkv", split_rows(array), strict=True):
                stored[f"{at}self_attn.{part}_proj.{ending}"] = rows
        elif kind == "mlp.gate_up":
            gate, up = np.split(array, 2)
            stored |= {f"{at}mlp.gate_proj.{ending}": gate, f"{at}mlp.up_proj.{ending}": up}
        else:
            stored[f"{at}{norms[kind]}.{ending}"] = array
    return stored


def experts_in_folder(family: str, at: str, kind: str, array: np.ndarray[Any, Any]) -> Arrays:
    block = at + ("block_sparse_moe" if family == "mixtral" else "mlp")
    if kind == "router":
        return {f"{block}.gate.weight": array}
    mixtral = {"gate": "w1", "up": "w3", "down": "w2"}
    name = mixtral[kind] if family == "mixtral" else f"{kind}_proj"
    return {f"{block}.experts.{e}.{name}.weight": matrix.T for e, matrix in enumerate(array)}


def gpt2_folder_tensors(arrays: Arrays) -> Arrays:
    """GPT-2's Conv1D layers keep their weights as [in, out]."""
    names = {
        "attn_norm": "ln_1",
        "attn.qkv": "attn.c_attn",
        "attn.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    outer = {"embed": "wte", "positions": "wpe", "final_norm": "ln_f"}
    stored: Arrays = {}
    for name, array in arrays.items():
        stem, _, ending = name.rpartition(".")
        if not stem.startswith("layers."):
            stored[f"transformer.{outer[stem]}.{ending}"] = array
            continue
        _, layer, kind = stem.split(".", 2)
        conv = kind.startswith(("attn.", "mlp.")) and ending == "weight"
        stored[f"transformer.h.{layer}.{names[kind]}.{ending}"] = array.T if conv else array
    return stored


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def folder_config(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json; a change to None takes the setting out."""
    settings: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    if family == "gpt2":
        settings |= {
            "n_embd": HIDDEN,
            "n_head": HEADS,
            "n_layer": LAYERS,
            "n_inner": FFN,
            "n_positions": CONTEXT,
            "activation_function": "gelu_new",
        }
    else:
        settings |= {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD,
            "intermediate_size": FFN,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 50_000.0,
        }
    if family == "mixtral":
        settings |= {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    if family == "qwen3_moe":
        settings |= {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
        settings |= {"moe_intermediate_size": FFN, "intermediate_size": 7 * FFN}
        settings |= {"norm_topk_prob": True}
    if family == "gemma3":
        settings |= {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}
        settings |= {"sliding_window": 16, "query_pre_attn_scalar": HEAD}
    return {key: value for key, value in (settings | changes).items() if value is not None}


def write_folder(folder: Path, config: dict[str, Any], tensors: Arrays, *, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        files = {"model.safetensors": tensors}
    else:
        names = sorted(tensors)
        files = {
            f"model-{n + 1:05}-of-{shards:05}.safetensors": {
                name: tensors[name] for name in names[n::shards]
            }
            for n in range(shards)
        }
        weight_map = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in files.items():
        save_file({n: np.ascontiguousarray(a) for n, a in part.items()}, folder / file)
    return folder
