"""Small files that save a later start work: each whole and as it was written, or not there.

A name is a digest of all that its content hangs on, this code and its libraries among it, so a
file is never out of date. Knows bytes, not what they mean.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_CODE = (_PACKAGE / "core", _PACKAGE / "models", _PACKAGE / "runtime")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
_SOURCES = (".py", ".cc", ".h")
_DIGEST_BYTES = 32


def name_of(*facts: object) -> str:
    """A file name for what follows from `facts`, as their repr tells them apart, and from us."""
    return hashlib.sha256(repr((_code(), *facts)).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    import pallas_kernels

    libraries = [(name, version(name)) for name in _LIBRARIES]
    digest = hashlib.sha256(repr((libraries, pallas_kernels.cpu.runs())).encode())
    for folder in (*_CODE, Path(pallas_kernels.__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(repr((path.name, path.read_bytes())).encode())
    return digest.hexdigest()


def read(path: Path) -> bytes | None:
    """What `write` was given; None where there is no such file, or not as it was written."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, data = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == digest else None


def write(path: Path, data: bytes) -> None:
    """All of it or nothing: a full or read-only disk costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            part = Path(folder) / "part"
            part.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(part, path)
    except OSError:
        return
