"""Named shapes of real models: tests, benchmarks and compile checks use these lists."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import KVLayout


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Rows as (new tokens, tokens in all), single-token rows first."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: tuple[tuple[int, int], ...]
    window: int = 0
    page_size: int = 16
    soft_cap: float = 0.0
    sinks: bool = False
    kv_dtype: str = ""  # of the pages; as the queries unless given, and then with scales

    def layout(self, lanes: int = 1) -> KVLayout:
        pages = sum(-(-total // self.page_size) for _, total in self.rows)
        return KVLayout(pages + 3, self.num_kv_heads, self.page_size, self.head_dim, lanes)


_MIXED = ((1, 1), (1, 17), (1, 300), (5, 5), (33, 290), (64, 64), (90, 700))
_DECODE = ((1, 3), (1, 16), (1, 255), (1, 256), (1, 257), (1, 1000))

_FEW = ((1, 40), (1, 300), (20, 20), (70, 333))
_LONG = ((1, 1000), (1, 1500), (1, 777), (1, 2048))

ATTENTION = (
    AttentionCase("smollm2_decode", 9, 3, 64, _DECODE),
    AttentionCase("smollm2_mixed", 9, 3, 64, _MIXED),
    AttentionCase("gemma3_global", 4, 1, 256, _MIXED),
    AttentionCase("gemma3_local", 4, 1, 256, _MIXED, window=512),
    AttentionCase("gemma3_local_narrow", 4, 1, 256, _MIXED, window=37),
    AttentionCase("gemma2_few", 8, 4, 256, _FEW, window=200, soft_cap=50.0),
    AttentionCase("qwen2_mixed", 14, 2, 64, _MIXED),
    AttentionCase("gpt2_few", 12, 12, 64, _FEW),
    AttentionCase("gpt_oss_few", 64, 8, 64, _FEW, window=128, sinks=True),
    AttentionCase("phi2_few", 4, 4, 80, _FEW),
    AttentionCase("phi3_medium_few", 24, 6, 128, _FEW, page_size=128),
    AttentionCase("stories_mixed", 8, 4, 8, _MIXED, page_size=8),
    AttentionCase("llama3_8b_decode", 32, 8, 128, _DECODE),
    AttentionCase("llama3_8b_long", 32, 8, 128, _LONG),
    AttentionCase("llama3_8b_int8", 32, 8, 128, _FEW, page_size=32, kv_dtype="int8"),
    AttentionCase("llama3_8b_fp8", 32, 8, 128, _FEW, page_size=32, kv_dtype="float8_e4m3fn"),
    AttentionCase("llama3_70b_shard", 8, 1, 128, _FEW, page_size=256),
    AttentionCase("mixtral_few", 32, 8, 128, _FEW, window=4096),
    AttentionCase("qwen3_mixed", 16, 8, 128, _MIXED, page_size=64),
    AttentionCase("one_chunk", 9, 3, 64, ((130, 130),)),
)

# As they are served, too many tokens for an interpreter: timed, and compiled
BUSY = (
    AttentionCase("llama3_8b_32_rows", 32, 8, 128, ((1, 2048),) * 32, page_size=64),
    AttentionCase("llama3_8b_one_row", 32, 8, 128, ((1, 8192),), page_size=64),
    AttentionCase("llama3_8b_prompt", 32, 8, 128, ((1024, 2048),), page_size=64),
    AttentionCase("llama3_70b_shard_64_rows", 8, 1, 128, ((1, 4096),) * 64, page_size=64),
    AttentionCase("gemma3_global_32_rows", 4, 1, 256, ((1, 2048),) * 32, page_size=64),
    AttentionCase("gemma3_local_32_rows", 4, 1, 256, ((1, 2048),) * 32, 512, page_size=64),
    AttentionCase("smollm2_mixed_many", 9, 3, 64, ((1, 1024),) * 31 + ((225, 512),)),
)


@dataclass(frozen=True, slots=True)
class PagesCase:
    """Pages of all layers that are copied at once, as KVLayout has them."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: str = "bfloat16"
    num_pages: int = 12
    size: int = 6  # pages at once

    def layout(self, lanes: int = 1) -> KVLayout:
        return KVLayout(self.num_pages, self.num_kv_heads, self.page_size, self.head_dim, lanes)


PAGES = (
    PagesCase("smollm2", 30, 3, 64),
    PagesCase("gemma3", 18, 1, 256),
    PagesCase("llama3_8b", 32, 8, 128, page_size=64),
    PagesCase("llama3_8b_int8", 32, 8, 128, page_size=32, dtype="int8"),
    PagesCase("llama3_70b_shard", 80, 1, 128, page_size=64, size=4),
)


@dataclass(frozen=True, slots=True)
class MatmulCase:
    """x [rows, inputs] times weight [outputs, inputs] of `dtype`, with so many scales an output."""

    name: str
    rows: int
    outputs: int
    inputs: int
    dtype: str = "int8"
    groups: int = 1
    is_integer: bool = False  # activations in int8 too


MATMUL = (
    MatmulCase("llama3_8b_qkv", 32, 6144, 4096, is_integer=True),
    MatmulCase("llama3_8b_prompt", 300, 1024, 4096, is_integer=True),
    MatmulCase("llama3_8b_down", 8, 1024, 14336, is_integer=True),
    MatmulCase("llama3_70b_shard", 64, 1280, 8192),
    MatmulCase("qwen3_gate_up_int4", 32, 6144, 1024, "int4", groups=8),
    MatmulCase("qwen3_prompt_int4", 300, 1024, 1024, "int4", groups=8),
    MatmulCase("llama3_8b_out_int4", 5, 4096, 4096, "int4", groups=32),
    MatmulCase("llama3_8b_out_fp8", 32, 4096, 4096, "float8_e4m3fn"),
    MatmulCase("gemma3_head", 32, 8192, 640, is_integer=True),
    MatmulCase("int8_by_stretches", 32, 2048, 2048, groups=16, is_integer=True),
)


@dataclass(frozen=True, slots=True)
class MoeCase:
    """Rows of each expert, behind each other; `spare` of nobody after them."""

    name: str
    experts: int
    outputs: int
    inputs: int
    group_sizes: tuple[int, ...]
    spare: int = 0


MOE = (
    MoeCase("mixtral", 8, 1792, 4096, (10, 0, 3, 25, 1, 0, 17, 8)),
    MoeCase("qwen3_moe", 16, 768, 2048, (5, 0, 0, 130, 7, 1, 1, 0, 40, 0, 2, 0, 0, 60, 4, 0), 6),
)
