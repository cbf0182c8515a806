"""Adapters as PEFT writes them, drawn at random, and the models that they make, in numpy."""

import json

import numpy as np
from safetensors.numpy import save_file

# By the decoder's name: the stems it is stored as, of one layer.
_LLAMA = {
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.out": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
_GPT2 = {
    "attn.qkv": ["attn.c_attn"],
    "attn.out": ["attn.c_proj"],
    "mlp.up": ["mlp.c_fc"],
    "mlp.down": ["mlp.c_proj"],
}


def draw(config, rank, seed, targets=None, scale=0.4):
    """-> tensors by PEFT's names, and by the decoder's names what they add, unscaled."""
    rng, tensors, added = np.random.default_rng(seed), {}, {}
    dim, inner = config.head_dim, config.intermediate_size
    heads, kv = config.num_heads * dim, config.num_kv_heads * dim
    sizes = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "c_attn": heads + 2 * kv}
    sizes |= {"gate_proj": inner, "up_proj": inner, "c_fc": inner}
    gpt2 = config.family == "gpt2"
    block = "transformer.h" if gpt2 else "model.layers"
    for layer in range(config.num_layers):
        for name, stems in (_GPT2 if gpt2 else _LLAMA).items():
            if name.startswith("mlp") and config.num_experts:
                continue
            size = {"attn.out": heads, "mlp.down": inner}.get(name, config.hidden_size)
            parts = []
            for stem in stems:
                short = stem.rpartition(".")[2]
                out = sizes.get(short, config.hidden_size)
                if targets is not None and short not in targets:
                    parts.append(np.zeros((out, size)))
                    continue
                a = rng.standard_normal((rank, size)).astype(np.float32) / np.sqrt(size)
                b = scale * rng.standard_normal((out, rank)).astype(np.float32)
                begin = f"base_model.model.{block}.{layer}.{stem}.lora_"
                tensors |= {f"{begin}A.weight": a, f"{begin}B.weight": b}
                parts.append(b.astype(np.float64) @ a)
            added[f"layers.{layer}.{name}.weight"] = np.concatenate(parts)
    return tensors, added


def write(folder, tensors, rank, **facts):
    """A folder of PEFT's. `facts` None leaves one out."""
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": None,
        "alpha_pattern": {},
        "rank_pattern": {},
        "layers_to_transform": None,
        "use_rslora": False,
        "a_field_of_later": {"x": 1},
    } | facts
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def merged(arrays, added, scale=2.0):
    """The model's arrays with what an adapter adds; 2 is `write`'s alpha over its rank."""
    changes = {name: (scale * change).astype(np.float32) for name, change in added.items()}
    return arrays | {name: arrays[name] + change for name, change in changes.items()}
