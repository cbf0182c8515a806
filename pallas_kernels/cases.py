"""Named attention shapes of real models: tests, benchmarks and compile checks use this one list."""

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

    def layout(self) -> KVLayout:
        pages = sum(-(-total // self.page_size) for _, total in self.rows)
        return KVLayout(pages + 3, self.num_kv_heads, self.page_size, self.head_dim)


_MIXED = ((1, 1), (1, 17), (1, 300), (5, 5), (33, 290), (64, 64), (90, 700))
_DECODE = ((1, 3), (1, 16), (1, 255), (1, 256), (1, 257), (1, 1000))

ATTENTION = (
    AttentionCase("smollm2_decode", 9, 3, 64, _DECODE),
    AttentionCase("smollm2_mixed", 9, 3, 64, _MIXED),
    AttentionCase("gemma3_global", 4, 1, 256, _MIXED),
    AttentionCase("gemma3_local", 4, 1, 256, _MIXED, window=512),
    AttentionCase("gemma3_local_narrow", 4, 1, 256, _MIXED, window=37),
    AttentionCase("qwen2_mixed", 14, 2, 64, _MIXED),
    AttentionCase("gpt2_mixed", 12, 12, 64, _MIXED),
    AttentionCase("stories_mixed", 8, 4, 8, _MIXED, page_size=8),
    AttentionCase("llama3_8b_decode", 32, 8, 128, _DECODE),
    AttentionCase("qwen3_mixed", 16, 8, 128, _MIXED, page_size=64),
    AttentionCase("one_chunk", 9, 3, 64, ((130, 130),)),
)
