"""What a decoder is made of. Families differ in these fields, not in code. No arrays, no files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of rotary frequencies beyond the trained context.

    `linear` divides every frequency by `factor`; `llama3` leaves high frequencies, divides low
    ones and blends between (Llama 3.1 model card). `low`, `high` and `original_context` serve
    llama3 alone.
    """

    kind: str  # "linear" | "llama3"
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer.

    Linear weights are [out, in]; a fused one stacks its parts along `out`. RMS norm weights are
    the factor itself (never 1 + w). Rotary embedding is rotate-half.
    """

    family: str  # "llama", "qwen2", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe", "t5"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of each expert, where there are several
    max_context: int
    norm_eps: float
    layer_norm: bool = False  # LayerNorm with bias, else RMSNorm
    activation: str = "silu"  # "silu" | "gelu_tanh" | "relu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False  # on attention output and both MLP layers
    qk_norm: bool = False  # RMS norm of each query and key head before rotation
    sandwich_norms: bool = False  # RMS norm of each block's output before it is added
    tied_head: bool = True  # the LM head is the embedding
    learned_positions: bool = False  # an embedding of the position, else rotary
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # of global layers
    windows: tuple[int, ...] = ()  # per layer: sliding window in tokens, 0 is global; () all global
    local_rope_base: float | None = None  # of layers with a window; None: rope_base there too
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    num_experts: int = 0  # MLPs of each layer, of which a token chooses; 0: there is one
    experts_per_token: int = 0
    norm_topk: bool = True  # what those that are chosen count adds up to one
    labels: tuple[str, ...] = ()  # of one that says labels, and writes nothing

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True, slots=True)
class Seq2SeqConfig(ModelConfig):
    """A decoder that listens to an encoder (Raffel et al., "T5", 2019). What is said of layers and
    heads is the decoder's, and heads and sizes are the encoder's too. Positions are a bias on
    scores by distance: `position_buckets` of them, the last from `farthest` on.
    """

    encoder_layers: int = 1
    position_buckets: int = 32
    farthest: int = 128
    start_token: int = 0  # what a target begins behind
    trained_tokens: int = 512  # of a source, and of a target
    scaled_head: bool = True  # the LM head is too large, by the root of hidden_size
