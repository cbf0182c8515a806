"""`fastserve models load` and `unload`: what a person asks of a server that runs elsewhere."""

from __future__ import annotations

import asyncio
import os

from fastserve_jax.client import AsyncClient
from fastserve_jax.terminal import console


def run_load(model: str, name: str | None, url: str, api_key: str | None) -> None:
    """Raises what the server said."""

    async def run() -> None:
        async with _client(url, api_key) as client:
            card = await client.load_model(model, name=name)
        console.print(f"{card.id} is served by {card.root}", highlight=False)

    with console.status(f"{url} is loading {model}"):
        asyncio.run(run())


def run_unload(name: str, url: str, api_key: str | None) -> None:
    async def run() -> None:
        async with _client(url, api_key) as client:
            await client.unload_model(name)

    asyncio.run(run())
    console.print(f"{name} has no new requests any more", highlight=False)


def _client(url: str, api_key: str | None) -> AsyncClient:
    key = api_key or os.environ.get("FASTSERVE_API_KEY")
    return AsyncClient(url, key, timeout_s=None, max_retries=0)
