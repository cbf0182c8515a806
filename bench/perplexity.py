"""What a narrower type costs a model: perplexity of a text, by the programs that serve.

    python bench/perplexity.py MODEL TEXT [--dtypes bf16,int8] [--kept PATTERNS] [--windows 64]

The text is cut into windows of so many tokens, each behind the model's own first token where it
has one; every token but a window's first is predicted from those before it. Prints perplexity by
dtype, and each dtype's over the first's. `--kept` are matrices that stay in bf16, by commas, where
* stands for anything (layers.*.mlp.down).
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from cyclopts import run

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.cli import cache_folder
from fastserve_jax.config import load_settings
from fastserve_jax.core.types import PromptEvent, Request, Sampling

BATCH = 16  # windows at once


def windows_of(loaded: Loaded, text: str, count: int, size: int) -> list[tuple[int, ...]]:
    tokens = loaded.tokenizer.encode_plain(text[: 12 * count * size])
    bos = loaded.tokenizer.encode("")
    body = size - len(bos)
    cut = [tokens[at : at + body] for at in range(0, len(tokens) - body, body)]
    return [tuple(bos + part) for part in cut[:count]]


async def losses(loaded: Loaded, windows: list[tuple[int, ...]]) -> list[float]:
    """Of every window, its tokens' mean negative log-probability in nat."""
    gate = asyncio.Semaphore(BATCH)
    async with loaded.engine() as engine:

        async def one(window: tuple[int, ...]) -> float:
            rules = Sampling(1, temperature=0, prompt_logprobs=0)
            found: list[float] = []
            request = Request(engine.new_id(), window, rules)
            async with gate, engine.stream(request) as events:
                async for event in events:
                    if isinstance(event, PromptEvent):
                        found += [scored.logprob for scored in event.scored]
            assert len(found) == len(window) - 1, (len(found), len(window))
            return -float(np.mean(found))

        return await asyncio.gather(*(one(window) for window in windows))


def main(
    model: str,
    text: Path,
    /,
    *,
    dtypes: str = "bf16,int8",
    kept: str = "",
    windows: int = 64,
    size: int = 512,
) -> None:
    first, said = 0.0, text.read_text(encoding="utf-8")
    keep = json.dumps(kept.split(",") if kept else [])
    for dtype in dtypes.split(","):
        settings = load_settings(
            overrides=[
                f"model.dtype={dtype}",
                f"model.int8_keep={keep}",
                f"engine.max_context={size + 16}",
            ]
        )
        loaded = load(model, settings, cache_folder())
        with loaded.runner:
            began = time.perf_counter()
            found = asyncio.run(losses(loaded, windows_of(loaded, said, windows, size)))
        nats, error = np.mean(found), np.std(found) / math.sqrt(len(found))
        first = first or float(nats)
        print(
            f"{model} {dtype}: perplexity {math.exp(nats):.3f} ({nats:.4f} +- {error:.4f} nat), "
            f"{100 * math.expm1(nats - first):+.2f}%, {len(found)} windows of {size} in "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run(main))
