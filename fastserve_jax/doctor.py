"""`fastserve doctor`: what this machine has, line by line, and what to do where something lacks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastserve_jax.weights.catalogue import read_catalogue
from fastserve_jax.weights.pull import model_file

PACKAGES = ("fastserve-jax", "jax", "jaxlib", "flax", "aiohttp", "tokenizers", "gguf")
ROOM_BYTES = 2 << 30  # a model, its compiled programs, and what pip unpacks


def findings(cache_dir: Path) -> Iterator[str]:
    """Lines to print; those that need doing something begin with '!'."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"python {platform.python_version()} on {platform.platform()}, {cores} cores"
    yield ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield from _devices()
    yield from _cache(cache_dir)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            yield "! port 8000 is taken: serve with --port N"
        else:
            yield "port 8000 is free"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> Iterator[str]:
    began = time.perf_counter()
    try:
        import jax
        import jax.numpy as jnp

        from fastserve_jax.runtime.memory import free_memory

        devices = jax.devices()
        free_bytes = free_memory(devices[0]).free_bytes
        assert float(jnp.ones(8).sum()) == 8
    except (ImportError, RuntimeError) as error:
        yield f"! JAX does not start: {error}. Reinstall with `make install`"
        return
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    yield (
        f"{len(devices)} {devices[0].platform} device(s): {kinds}; {free_bytes / 2**30:.1f} GiB "
        f"free; first computation after {time.perf_counter() - began:.1f} s"
    )
    if devices[0].platform == "cpu":
        from pallas_kernels import cpu

        yield f"int8 kernels for this processor: {cpu.missing() or 'in use'}"
    if devices[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        yield "! JAX does not use this machine's NVIDIA GPU: pip install 'fastserve-jax[cuda12]'"


def _cache(cache_dir: Path) -> Iterator[str]:
    here = [
        name for name, entry in read_catalogue().items() if model_file(entry, cache_dir).exists()
    ]
    compiled = cache_dir / "compiled"
    files = [path.stat().st_size for path in compiled.glob("*")] if compiled.exists() else []
    yield (
        f"cache {cache_dir}: models {', '.join(sorted(here)) or 'none yet'}; "
        f"{len(files)} compiled programs, {sum(files) / 2**20:.0f} MiB"
    )
    folder = next(path for path in (cache_dir, *cache_dir.parents) if path.exists())
    if not os.access(folder, os.W_OK):
        yield f"! {folder} cannot be written: set FASTSERVE_CACHE to a folder that can"
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < ROOM_BYTES:
        yield f"! {free_bytes / 2**20:.0f} MiB left on its disk: make room, or set FASTSERVE_CACHE"
