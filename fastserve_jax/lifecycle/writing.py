"""A folder to write in, beside where what is written belongs: moved there whole, or gone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastserve_jax.errors import ConfigError


@contextmanager
def writing(beside: Path) -> Iterator[Path]:
    """Raises ConfigError where the disk does not take it."""
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=".writing-") as folder:
            yield Path(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write in {beside}: {error}: make room, or go elsewhere"
        ) from error
