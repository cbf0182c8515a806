"""A real model under pressure: many streams at once against each alone.

    python bench/together.py smollm2-135m-instruct [--streams 64] [--dtype bf16] [--policy fcfs]

Prompts and lengths are mixed, every sixth stream is given up half way, and the KV pool holds a
quarter of what all want, so sequences are preempted. Every finished greedy text must equal that of
the same request alone; where it does not, the first difference must lie where the alone run's two
best tokens are within 0.1 nat. Prints the configuration, the rate of differences and tokens/s, and
exits with 1 if a difference is not such a near tie.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass

from cyclopts import run

from fastserve_jax.assemble import Loaded, load
from fastserve_jax.cli import cache_folder
from fastserve_jax.config import load_settings
from fastserve_jax.core.stats import Stats
from fastserve_jax.core.types import Request, Sampling, TokenEvent

NEAR_TIE = 0.1  # nat
SLOTS = 16
WORDS = "the,river,old,house,walked,into,light,a,summer,of,numbers,and,found,that,every,door"


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    max_tokens: int
    leave_after: int | None


def asks(loaded: Loaded, streams: int) -> list[Ask]:
    chance = random.Random(1)
    made = []
    for i in range(streams):
        text = " ".join(chance.choices(WORDS.split(","), k=chance.randint(2, 90))).capitalize()
        prompt = tuple(loaded.tokenizer.encode(text))
        leave_after = chance.randint(1, 6) if i % 6 == 5 else None
        made.append(Ask(prompt, chance.randint(8, 48), leave_after))
    return made


async def together(
    loaded: Loaded, every: list[Ask], overlap: bool
) -> tuple[list[list[int]], float, Stats]:
    """Tokens of each, seconds in all, and what the engine counted."""
    async with loaded.engine(overlap=overlap) as engine:

        async def one(ask: Ask) -> list[int]:
            got: list[int] = []
            rules = Sampling(ask.max_tokens, temperature=0)
            async with engine.stream(Request(engine.new_id(), ask.prompt, rules)) as events:
                async for event in events:
                    if isinstance(event, TokenEvent):
                        got.append(event.token)
                        if len(got) == ask.leave_after:
                            break
            return got

        began = time.perf_counter()
        texts = await asyncio.gather(*map(one, every))
        elapsed_s = time.perf_counter() - began
        await engine.drain()
        stats = engine.stats()
    assert stats.running == stats.waiting == stats.ending == stats.pages_used == 0, stats
    return texts, elapsed_s, stats


async def alone(loaded: Loaded, every: list[Ask]) -> list[list[tuple[int, float]]]:
    """(token, distance of the two best in nats) of each, one request at a time."""
    runs = []
    async with loaded.engine(overlap=False) as engine:
        for ask in every:
            rules = Sampling(ask.max_tokens, temperature=0, logprobs=2)
            async with engine.stream(Request(engine.new_id(), ask.prompt, rules)) as events:
                drawn = [event async for event in events if isinstance(event, TokenEvent)]
            runs.append([(event.token, event.top[0][1] - event.top[1][1]) for event in drawn])
    return runs


def differences(
    every: list[Ask], texts: list[list[int]], runs: list[list[tuple[int, float]]]
) -> list[float]:
    """Margin of the alone run at the first difference of each finished stream that differs."""
    margins = []
    for ask, text, known in zip(every, texts, runs, strict=True):
        if ask.leave_after is None:
            assert len(text) == len(known)
            first = next((m for t, (k, m) in zip(text, known, strict=True) if t != k), None)
            if first is not None:
                margins.append(first)
    return margins


def main(
    model: str = "smollm2-135m-instruct",
    /,
    *,
    streams: int = 64,
    dtype: str = "bf16",
    policy: str = "fcfs",
) -> None:
    sets = [f"engine.max_slots={SLOTS}", "engine.max_context=256", "kv.pages=48"]
    settings = load_settings(None, [*sets, f"model.dtype={dtype}", f"engine.policy={policy}"])
    loaded = load(model, settings, cache_folder())
    every = asks(loaded, streams)
    with loaded.runner:
        runs = asyncio.run(alone(loaded, every))
        print(f"{loaded.name} {dtype} {policy}: {streams} streams, {SLOTS} slots, {loaded.limits}")
        failed = False
        for overlap in (True, False):
            texts, elapsed_s, stats = asyncio.run(together(loaded, every, overlap))
            margins = differences(every, texts, runs)
            finished = sum(ask.leave_after is None for ask in every)
            failed |= any(margin > NEAR_TIE for margin in margins)
            print(
                f"overlap {overlap}: {len(margins)} of {finished} finished texts differ"
                f"{' at margins ' + ', '.join(f'{m:.3f}' for m in margins) if margins else ''}; "
                f"{stats.preemptions} preemptions, {stats.prefix_hit_tokens} tokens from the "
                f"prefix cache, {stats.output_tokens / elapsed_s:.0f} tokens/s"
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)
