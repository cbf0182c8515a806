"""What the kernels read and multiply as they are written, beside the least there is: their own
walks over items and pages, run in Python with copies that only count."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cases
from pallas_kernels.gpu import kernel as gpu_kernel
from pallas_kernels.gpu.rules import WARPS, Rules
from pallas_kernels.items import chunk_items, decode_items
from pallas_kernels.tpu import kernel
from tests.kernels.rows import build

DECODE = [case for case in cases.ATTENTION if all(new == 1 for new, _ in case.rows)]
WINDOWED = cases.AttentionCase("windowed", 64, 8, 64, ((1, 1500), (1, 90), (1, 777)), window=128)
PREFILL = [
    cases.AttentionCase("llama3_8b_prefill", 32, 8, 128, ((1024, 1024),)),
    cases.AttentionCase("llama3_8b_behind", 32, 8, 128, ((512, 4096),)),
    cases.AttentionCase("llama3_8b_two", 32, 8, 128, ((1024, 1024), (1024, 3000))),
    cases.AttentionCase("smollm2_prefill", 9, 3, 64, ((1024, 1024),)),
    cases.AttentionCase("gemma3_local_prefill", 4, 1, 256, ((2048, 2048),), window=512),
]


class Copies:
    """Stands for the pages in memory and for their place in the chip."""

    def __init__(self, page_bytes_of_head):
        self.bytes, self.of_head = 0, page_bytes_of_head

    @property
    def at(self):
        return self

    def __getitem__(self, key):
        heads = next((k for k in key if hasattr(k, "size") and hasattr(k, "start")), None)
        return heads.size if heads is not None else 0

    def made(self, source, target, semaphore):
        self.bytes += source * self.of_head


def walk(case, items, tiles, monkeypatch):
    """Bytes read and multiplications of one call."""
    layout = case.layout(128)
    page_bytes = layout.page_bytes(jnp.bfloat16)
    copies = Copies(page_bytes // case.num_kv_heads)
    block = tiles.pages * case.page_size
    walked = kernel.Kernel(
        **dict.fromkeys(("sinks", "kv_scales", "out", "lse", "best", "total", "sum", "q")),
        tiles=tiles,
        scale=1.0,
        window=case.window,
        soft_cap=0.0,
        items=items,
        table=None,
        next_table=None,
        kv_pages=copies,
        buffer=SimpleNamespace(shape=(2, tiles.heads, block, layout.shape[3]), at=copies),
        arrived=SimpleNamespace(at=[None, None]),
        turn=None,
    )
    monkeypatch.setattr(kernel.pltpu, "make_async_copy", copies.made)
    table = np.zeros((1, 1, 1 << 20), np.int32)
    blocks = 0
    for group in range(case.num_kv_heads // tiles.heads):
        for item in range(int(items.real[0])):
            begin, end = span = walked.span(item)
            for at in range(int(begin) // block, -(-int(end) // block)):
                walked.copies(table, group, at, span, 0, lambda copy: None)
                blocks += tiles.heads
    rows = tiles.queries * case.num_heads // case.num_kv_heads
    return copies.bytes, 2 * blocks * rows * block * case.head_dim


def seen(case, position):
    return min(position + 1, case.window or position + 1)


@pytest.mark.parametrize("case", [*DECODE, WINDOWED], ids=lambda case: case.name)
def test_rows_of_one_token_read_each_live_page_once(case, monkeypatch):
    _, _, kv_lens, _, _, distribution = build(case, jnp.bfloat16)
    layout = case.layout(128)
    tiles = kernel.Tiles.for_rows(layout, 2)
    with jax.disable_jit():
        read, _ = walk(case, decode_items(kv_lens, distribution[0]), tiles, monkeypatch)
    pages = sum(
        -(-total // case.page_size) - (total - seen(case, total - 1)) // case.page_size
        for _, total in case.rows
    )
    assert read <= 1.1 * pages * layout.page_bytes(jnp.bfloat16)
    if case.window:
        assert read < 0.4 * sum(-(-t // case.page_size) for _, t in case.rows) * layout.page_bytes(
            jnp.bfloat16
        )


@pytest.mark.parametrize("case", PREFILL, ids=lambda case: case.name)
def test_chunks_multiply_little_more_than_they_must(case, monkeypatch):
    _, _, kv_lens, _, cu_q_lens, distribution = build(case, jnp.bfloat16)
    tokens = sum(new for new, _ in case.rows)
    layout = case.layout(128)
    tiles = kernel.Tiles.for_chunks(layout, 2, case.num_heads // case.num_kv_heads, tokens)
    with jax.disable_jit():
        items, _ = chunk_items(kv_lens, cu_q_lens, distribution, tiles.queries, tokens)
        _, made = walk(case, items, tiles, monkeypatch)
    keys = sum(
        seen(case, position) for new, total in case.rows for position in range(total - new, total)
    )
    # A window begins and ends within blocks of keys: one more for every four of them.
    most = 1.26 if case.window else 1.2
    assert made <= most * 2 * keys * case.num_heads * case.head_dim


class Pages:
    """Stands for them: which, and how many of its rows."""

    def __init__(self, page=None, rows=0):
        self.page, self.rows = page, rows

    @property
    def at(self):
        return self

    def __getitem__(self, key):
        if self.page is None:
            return Pages(tuple(map(int, key)), self.rows)
        return Pages((*self.page, int(key.start)), key.size)


class Anything:
    def __getitem__(self, key):
        return None


def walk_gpu(case, items, row_warps, together, monkeypatch):
    """Rows of a page read, rows of different places read, and multiplications, of one call on a
    chip with TMA."""
    own, heads = case.num_heads // case.num_kv_heads, case.num_kv_heads
    known = (1.0, case.window, 0.0, case.page_size, case.head_dim, 1)
    by_wgmma = row_warps == WARPS
    rules = Rules(*known, row_warps, own, 1, jnp.bfloat16, True, by_wgmma, None)
    named = dict.fromkeys(("q", "sinks", "kv_scales", "out", "lse", "operand", "wide"))
    nothing = SimpleNamespace(at=Anything())
    table = np.arange(len(case.rows) << 12).reshape(len(case.rows), 1 << 12)
    pages = Pages(rows=case.page_size)
    walked = gpu_kernel._Kernel(
        rules=rules,
        items=items,
        table=table,
        kv_pages=pages,
        buffer=nothing,
        arrived=nothing,
        **named,
    )
    read = []
    monkeypatch.setattr(
        gpu_kernel.plgpu, "copy_gmem_to_smem", lambda source, *_: read.append(source)
    )
    blocks = 0
    for item in range(int(items.real[0])):
        span = walked.span(item)
        low, high = map(int, walked.blocks(*span, 0))
        for at in range(low, high):
            walked.fetch(int(items.row[item]), 0, span, jnp.int32(at), 0)
            blocks += 1
    assert together * own <= rules.rows
    places = {(source.page, source.rows) for source in read}
    made = 2 * heads * blocks * rules.rows * rules.keys * case.head_dim
    return heads * sum(s.rows for s in read), heads * sum(rows for _, rows in places), made


@pytest.mark.parametrize("case", [*DECODE, WINDOWED], ids=lambda case: case.name)
def test_a_gpu_reads_each_live_page_once(case, monkeypatch):
    _, _, kv_lens, _, _, distribution = build(case, jnp.bfloat16)
    with jax.disable_jit():
        items = decode_items(kv_lens, distribution[0])
        asked, read, _ = walk_gpu(case, items, 1, 1, monkeypatch)
    pages = sum(
        -(-total // case.page_size) - (total - seen(case, total - 1)) // case.page_size
        for _, total in case.rows
    )
    rows = pages * case.page_size * case.num_kv_heads
    assert read == rows
    # A page beside fills up the block in which a sequence, or a window, ends: from the cache.
    assert asked <= (1.34 if case.window else 1.1) * rows


@pytest.mark.parametrize("case", PREFILL, ids=lambda case: case.name)
def test_a_gpus_chunks_multiply_little_more_than_they_must(case, monkeypatch):
    _, _, kv_lens, _, cu_q_lens, distribution = build(case, jnp.bfloat16)
    tokens = sum(new for new, _ in case.rows)
    together = 16 * WARPS * case.num_kv_heads // case.num_heads
    with jax.disable_jit():
        items, _ = chunk_items(kv_lens, cu_q_lens, distribution, together, tokens)
        _, _, made = walk_gpu(case, items, WARPS, together, monkeypatch)
    keys = sum(
        seen(case, position) for new, total in case.rows for position in range(total - new, total)
    )
    assert made <= 1.2 * 2 * keys * case.num_heads * case.head_dim
