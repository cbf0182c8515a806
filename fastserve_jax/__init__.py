"""fastserve-jax: an asyncio-native LLM server on JAX. Importing it is cheap: no jax, no aiohttp."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve_jax.client import AsyncClient

__all__ = ["AsyncClient"]


def __getattr__(name: str) -> object:
    if name == "AsyncClient":
        from fastserve_jax.client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
