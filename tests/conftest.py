"""Fixtures for every room: reference files beside the checkout, and models of the catalogue."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from fastserve_jax.weights.pull import pull

_SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """What one test has compiled no other one compiles again, nor any process that they start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="fastserve-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for processes goes first, that it may do so beside the rest."""
    items.sort(key=lambda item: item.path.parent.name not in ("serve", "fleet"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A file of the reference material beside the checkout; skips where it is not."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"reference file {name} is not beside the checkout")
        return path

    return find


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """The file of a catalogue model, downloaded once into the user's cache."""
    cache = os.environ.get("FASTSERVE_CACHE")
    folder = Path(cache) if cache else platformdirs.user_cache_path("fastserve")
    return lambda name: pull(name, folder)
