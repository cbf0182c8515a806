"""A small ModelConfig of every family the decoder claims, with what sets it apart switched on."""

from fastserve_jax.models.config import ModelConfig, RopeScaling

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "max_context": 128,
    "norm_eps": 1e-6,
}

FAMILIES = {
    "llama": ModelConfig("llama", **_SMALL, rope_base=100.0),
    "llama3_scaled": ModelConfig(
        "llama", **_SMALL, tied_head=False, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 32)
    ),
    "llama_linear": ModelConfig("llama", **_SMALL, rope_scaling=RopeScaling("linear", 2.0)),
    "mistral_window": ModelConfig("llama", **_SMALL, windows=(9, 9)),
    "qwen2": ModelConfig("qwen2", **_SMALL, qkv_bias=True),
    "qwen3": ModelConfig("qwen3", **_SMALL, qk_norm=True),
    "gemma3": ModelConfig(
        "gemma3",
        **{**_SMALL, "num_kv_heads": 1, "head_dim": 16},
        activation="gelu_tanh",
        qk_norm=True,
        sandwich_norms=True,
        rope_base=1000.0,
        local_rope_base=50.0,
        windows=(11, 0),
        embedding_scale=48**0.5,
        attention_scale=0.2,
    ),
    "gpt2": ModelConfig(
        "gpt2",
        **{**_SMALL, "num_kv_heads": 6},
        layer_norm=True,
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        linear_bias=True,
        learned_positions=True,
    ),
    "mixtral": ModelConfig("mixtral", **_SMALL, num_experts=4, experts_per_token=2),
    "qwen3_moe": ModelConfig(
        "qwen3_moe",
        **{**_SMALL, "intermediate_size": 24},
        qk_norm=True,
        num_experts=8,
        experts_per_token=3,
        norm_topk=False,
    ),
}
