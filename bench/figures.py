"""What bench/compare.py counts: rows, their medians, and how they are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from loadgen import Answer

SERVERS = ("ours", "peer")


@dataclass(frozen=True)
class Point:
    name: str
    input: int
    output: int
    requests: int
    clients: int = 1
    rate: float | None = None
    is_prefill: bool = False  # prompt tokens are what counts


@dataclass(frozen=True)
class Row:
    server: str
    round: int
    point: str
    input_tokens: float  # of a request, by the server's own count
    output_tokens: float
    elapsed_s: float
    tokens_per_s: float  # of all answers; at a prefill point, of all prompts
    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_s: float | None  # None: one token each
    itl_p95_s: float | None
    tokens_per_chunk: float


def row(name: str, point: Point, turn: int, answers: list[Answer], elapsed_s: float) -> Row:
    prompts = [answer.prompt_tokens for answer in answers]
    outputs = [answer.output_tokens for answer in answers]
    chunks = sum(len(answer.gaps_s) + 1 for answer in answers)
    firsts = np.percentile([answer.ttft_s for answer in answers], (50, 95)).tolist()
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    between = np.percentile(gaps, (50, 95)).tolist() if gaps else (None, None)
    tokens = sum(prompts if point.is_prefill else outputs)
    means = fmean(prompts), fmean(outputs)
    rate = tokens / elapsed_s
    per_chunk = sum(outputs) / chunks
    return Row(name, turn, point.name, *means, elapsed_s, rate, *firsts, *between, per_chunk)


def describe(row: Row) -> str:
    between = "" if row.itl_p50_s is None else f", between {row.itl_p50_s * 1e3:.1f} ms"
    return (
        f"{row.server}  {row.tokens_per_s:8.1f} tokens/s, "
        f"first token {row.ttft_p50_s * 1e3:.0f} ms{between}"
    )


def by_point(found: list[Row], points: list[Point]) -> dict[str, dict[str, Any]]:
    """Each server's means of token counts and medians over rounds of the rest; ours/peer too."""
    counts = ("input_tokens", "output_tokens", "tokens_per_chunk")
    figures = ("tokens_per_s", "ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s")
    all_told: dict[str, dict[str, Any]] = {}
    for point in points:
        told = all_told[point.name] = {}
        rates = []
        for name in SERVERS:
            mine = [row for row in found if (row.point, row.server) == (point.name, name)]
            if not mine:
                continue
            mine.sort(key=lambda row: row.round)
            rates.append([row.tokens_per_s for row in mine])
            told[name] = {count: fmean(getattr(row, count) for row in mine) for count in counts}
            for figure in figures:
                seen = [v for row in mine if (v := getattr(row, figure)) is not None]
                told[name][figure] = median(seen) if seen else None
        if len(rates) == 2:
            ratios = [ours / peer for ours, peer in zip(*rates, strict=True)]
            told["ratio"], told["ratio_range"] = median(ratios), [min(ratios), max(ratios)]
    return all_told


def table(told: dict[str, dict[str, Any]], points: list[Point]) -> Iterator[str]:
    yield "point          server  tokens/s   first token ms p50    p95   between ms p50    p95"
    for point in points:
        at = told[point.name]
        for name in SERVERS:
            if name in at:
                yield f"{point.name:14} {name:6} {_figures(at[name])}"
                yield from _notes(name, at[name], point)
        if "ratio" in at:
            low, high = at["ratio_range"]
            yield f"{point.name:14} ours/peer {at['ratio']:6.3f}  ({low:.3f} to {high:.3f})"


def _figures(at: dict[str, Any]) -> str:
    between = [
        f"{s * 1e3:.1f}" if s is not None else "-" for s in (at["itl_p50_s"], at["itl_p95_s"])
    ]
    return (
        f"{at['tokens_per_s']:9.1f} {at['ttft_p50_s'] * 1e3:20.0f} {at['ttft_p95_s'] * 1e3:6.0f} "
        f"{between[0]:>16} {between[1]:>6}"
    )


def _notes(name: str, at: dict[str, Any], point: Point) -> Iterator[str]:
    counted = at["input_tokens"], at["output_tokens"]
    if counted != (point.input, point.output):
        yield (
            f"  note: {name} counts {counted[0]:.1f} tokens in and {counted[1]:.1f} out, "
            f"not {point.input} and {point.output}"
        )
    if not 0.95 < at["tokens_per_chunk"] < 1.05:
        yield f"  note: {name} sends {at['tokens_per_chunk']:.2f} tokens a chunk"
