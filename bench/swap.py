"""What clients notice when one version takes the place of another in a running server.

    python bench/swap.py MODEL [--streams 32] [--dtype bf16] [--memory .45]

MODEL is registered twice in a cache of its own, and served by its name; so many clients stream one
answer after the other, no token guessed, and in the midst of it the second version is promoted.
Prints, before, while it is loaded, and after: tokens/s, the longest time between two tokens of one
answer, errors; and what the device held before and after. Exits with 1 where a request failed.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
from cyclopts import run

from fastserve_jax.cli import cache_folder
from fastserve_jax.client import AsyncClient
from fastserve_jax.config import load_settings
from fastserve_jax.errors import FastServeError
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.lifecycle.vocabulary import copy_vocabulary
from fastserve_jax.models.decoder import parameters
from fastserve_jax.serve import serve_models
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry

NAME = "swapped"
PROMPT = "Once upon a time, in a house by the river, there was a"


@dataclass
class Seen:
    tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)
    errors: int = 0


def registered(model: str, cache: Path) -> Registry:
    """Twice the same: what is loaded beside is what matters."""
    files = open_model(model, cache_folder())
    shapes = {name: leaf.shape for name, leaf in parameters(Model(files.config).empty).items()}
    write_model(cache / "made", files.config, dict(files.tensors(shapes)))
    copy_vocabulary(files.tokenizer_source, cache / "made")
    registry = Registry(cache / REGISTRY)
    for _ in range(2):
        registry.add(NAME, cache / "made", "train")
    return registry


async def ask(client: AsyncClient, phase: list[Seen]) -> None:
    while True:
        try:
            async with client.stream_complete(
                PROMPT, max_tokens=64, temperature=0, ignore_eos=True
            ) as chunks:
                before = None
                async for _ in chunks:
                    now, seen = time.perf_counter(), phase[-1]
                    seen.tokens += 1
                    if before is not None:
                        seen.gaps_s.append(now - before)
                    before = now
        except FastServeError as error:
            print(f"a request failed: {error}")
            phase[-1].errors += 1


async def taken_over(client: AsyncClient) -> None:
    for _ in range(60_000):
        if (await client.models())[0].root == f"{NAME}@2":
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("ten minutes, and it is not there")


def held_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


async def measure(model: str, streams: int, seconds: float, sets: list[str], cache: Path) -> bool:
    registry, phase = registered(model, cache), [Seen()]
    stop, url = asyncio.Event(), asyncio.get_running_loop().create_future()
    sets = ["server.port=0", f"engine.max_slots={streams}", "engine.speculate=off", *sets]
    settings = load_settings(None, sets)
    began = (time.perf_counter(), None, stop, url.set_result)
    serving = asyncio.create_task(serve_models([NAME], settings, cache, *began))
    await asyncio.wait({url, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()  # raises why
    async with AsyncClient(await url, max_retries=0) as client:
        held = held_bytes()
        clients = [asyncio.create_task(ask(client, phase)) for _ in range(streams)]
        await asyncio.sleep(seconds)  # the first requests all begin together
        for name in ("before", "loading", "after"):
            phase.append(Seen())
            start = time.perf_counter()
            if name == "loading":
                registry.promote(f"{NAME}@2")
                await taken_over(client)
            else:
                await asyncio.sleep(seconds)
            show(name, phase[-1], time.perf_counter() - start)
        print(f"held: {held / 1e6:,.1f} MB before, {held_bytes() / 1e6:,.1f} MB after")
        for task in clients:
            task.cancel()
    stop.set()
    await serving
    return not any(seen.errors for seen in phase)


def show(name: str, seen: Seen, elapsed_s: float) -> None:
    gaps_s = seen.gaps_s or [math.nan]
    print(
        f"{name:8} {elapsed_s:5.1f} s, {seen.tokens / elapsed_s:8,.0f} tokens/s; "
        f"between two tokens {1e3 * statistics.median(gaps_s):.1f} ms, "
        f"at the most {1e3 * max(gaps_s):.0f}; "
        f"{seen.errors} errors",
        flush=True,
    )


def main(
    model: str,
    /,
    *,
    streams: int = 32,
    seconds: float = 8.0,
    dtype: str = "auto",
    memory: float = 0.0,
) -> None:
    sets = [f"model.dtype={dtype}", f"model.memory={memory}"]
    with tempfile.TemporaryDirectory() as cache:
        fine = asyncio.run(measure(model, streams, seconds, sets, Path(cache)))
    sys.exit(not fine)


if __name__ == "__main__":
    run(main)
