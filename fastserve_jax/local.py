"""A model in this process, for one person: completing and chatting in the terminal."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from fastserve_jax.api.chat import ChatTurn
from fastserve_jax.assemble import load
from fastserve_jax.config import Settings
from fastserve_jax.core.types import DoneEvent, Finish, Request, Sampling, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.errors import ConfigError, EngineFailed
from fastserve_jax.terminal import Bars


class Local:
    """Use as a context manager; answers are written to standard output as they come."""

    def __init__(self, reference: str, settings: Settings, cache_dir: Path) -> None:
        with Bars() as bars:
            self._loaded = load(reference, settings, cache_dir, bars)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded.runner.__exit__()

    def complete(self, prompt: str, max_tokens: int, temperature: float, seed: int) -> None:
        async def run() -> None:
            loaded = self._loaded
            ids = [*loaded.tokenizer.encode(prompt), *loaded.opening]
            async with loaded.engine() as engine:
                print("" if loaded.opening else prompt, end="", flush=True)
                await self._answer(engine, ids, max_tokens, temperature, seed)

        asyncio.run(run())

    def converse(self, system: str | None, max_tokens: int, temperature: float) -> None:
        if self._loaded.opening:
            name = self._loaded.name
            raise ConfigError(
                f"{name} has an encoder and holds no conversation: fastserve generate"
            )
        asyncio.run(self._converse(system, max_tokens, temperature))

    async def _converse(self, system: str | None, max_tokens: int, temperature: float) -> None:
        turns: list[ChatTurn] = [{"role": "system", "content": system}] if system else []
        async with self._loaded.engine() as engine:
            while text := await asyncio.to_thread(_ask):
                turns.append({"role": "user", "content": text})
                ids = self._loaded.template.encode(turns)
                seed = secrets.randbits(32)
                answer = await self._answer(engine, ids, max_tokens, temperature, seed)
                turns.append({"role": "assistant", "content": answer})

    async def _answer(
        self, engine: Engine, ids: Sequence[int], max_tokens: int, temperature: float, seed: int
    ) -> str:
        tokenizer = self._loaded.tokenizer
        room = self._loaded.limits.max_context - len(ids)
        sampling = Sampling(
            max_tokens=max(min(max_tokens, room), 1),
            temperature=temperature,
            seed=seed % 2**32,
            stop_ids=tokenizer.eos_ids,
        )
        text, stream = "", tokenizer.stream()
        async with engine.stream(Request(engine.new_id(), tuple(ids), sampling)) as events:
            async for event in events:
                new = stream.push(event.token) if isinstance(event, TokenEvent) else ""
                if isinstance(event, DoneEvent):
                    if event.reason is Finish.ERROR:
                        raise EngineFailed("the model's numbers are not finite")
                    new = stream.flush()
                text += new
                print(new, end="", flush=True)
        print()
        return text


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""
