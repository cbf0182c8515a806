"""Models of ours as others read them: a Hugging Face folder, or a GGUF file.

The tables of names that reading goes by are gone through backwards, so that what is written is read
back as it was. Families with rotary positions and one MLP; knows no tokens but their files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.weights.names import GGUF, GGUF_LLAMA, HF, Names, halves_back

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
type Parameters = Iterator[tuple[str, NDArray[Any]]]


def write_folder(folder: Path, config: ModelConfig, parameters: Parameters) -> None:
    """config.json and model.safetensors, in bfloat16. Raises ConfigError for another family."""
    from safetensors.numpy import save_file

    architecture = _architecture(config)
    folder.mkdir()
    stored = {name: np.ascontiguousarray(a) for name, a in _stored(HF, config, parameters)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(config, architecture), indent=2))


def _architecture(config: ModelConfig) -> str:
    if config.family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"a {config.family} cannot be exported: {known} can")
    if config.rope_scaling is not None or any(config.windows):
        raise ConfigError("a model with scaled positions or windows cannot be exported")
    return _ARCHITECTURES[config.family]


def _config(config: ModelConfig, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "hidden_act": config.activation,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "bfloat16",
    }


def write_gguf(
    path: Path, name: str, config: ModelConfig, parameters: Parameters, tokenizer: Mapping[str, Any]
) -> None:
    """In float16, norms in float32. `tokenizer` is the file's tokenizer.* metadata. Raises
    ConfigError for another family."""
    import gguf

    _architecture(config)
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in tokenizer.items():
        _add(writer, key, value)
    names = GGUF_LLAMA if config.family == "llama" else GGUF
    for stored, array in _stored(names, config, parameters):
        dtype = np.float16 if array.ndim > 1 else np.float32
        writer.add_tensor(stored, np.ascontiguousarray(array.astype(np.float32).astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    add: Mapping[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _stored(names: Names, config: ModelConfig, parameters: Parameters) -> Parameters:
    """Each parameter as the tensors that it is stored as, under their names."""
    for name, array in parameters:
        stem, _, ending = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", name)
        number = layer[1] if layer else ""
        pattern = stem.replace(f".{number}.", ".{i}.", 1) if layer else stem
        parts = names.parts[pattern]
        bounds = [*accumulate(_sizes(pattern, config))][:-1] if len(parts) > 1 else []
        for part, own in zip(parts, np.split(array, bounds), strict=True):
            yield f"{part.replace('{i}', number)}.{ending}", _turned(names, part, own, config)


def _sizes(pattern: str, config: ModelConfig) -> list[int]:
    """Of the parts of a fused matrix, along its outputs."""
    dim = config.head_dim
    if pattern.endswith("qkv"):
        return [config.num_heads * dim, config.num_kv_heads * dim, config.num_kv_heads * dim]
    return [config.intermediate_size, config.intermediate_size]


def _turned(names: Names, part: str, array: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    if part not in names.transforms:
        return array
    heads = config.num_heads if part.endswith("attn_q") else config.num_kv_heads
    return halves_back(array, heads)
