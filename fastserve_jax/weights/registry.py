"""Models of our own by name and version, and what each came from.

    NAME/0001/     a model's folder, as weights/orbax.py has it, with its tokenizer, or an adapter's
    NAME/0001/version.json
    NAME/current   the number of the version that NAME alone means

A version is there whole or not at all, and never changes; `current` is replaced in one move.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.weights.catalogue import embedded, read_catalogue
from fastserve_jax.weights.orbax import CONFIG, ENCODER

REGISTRY = "registry"  # in the cache
VERSION, CURRENT, MEASURED = "version.json", "current", "measured.jsonl"
ADAPTER = "adapter_config.json"  # of a folder in PEFT's format: see adapter.py
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REFERENCE = re.compile(r"([^@]+)(?:@(\d+))?")


@dataclass(frozen=True, slots=True)
class Version:
    """`parent` is what it was made of: a version, a catalogue name or a path; "" of nothing."""

    name: str
    number: int
    made_at: str  # UTC
    how: str  # "train", "compress"
    parent: str = ""
    data: str = ""  # fingerprint of what it was trained on
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


def check_name(name: str) -> None:
    """Raises ModelFileError for what is no name, or is somebody else's."""
    if not _NAME.fullmatch(name):
        raise ModelFileError(f"{name!r} is no name: small letters, digits, '.', '_' and '-'")
    if name in read_catalogue() or embedded(name) is not None:
        raise ModelFileError(f"{name} is a model of the catalogue: take another name")


class Registry:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        name: str,
        model: Path,
        how: str,
        *,
        parent: str = "",
        data: str = "",
        settings: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Version:
        """A copy of that folder as the next version. The first one is promoted. Raises
        ModelFileError, and ConfigError where a metric is no number."""
        check_name(name)
        if lost := [metric for metric, of in (metrics or {}).items() if not math.isfinite(of)]:
            raise ConfigError(f"{', '.join(lost)} of {name} is not finite: it is not registered")
        if not any((model / config).is_file() for config in (CONFIG, ENCODER, ADAPTER)):
            raise ModelFileError(f"{model}: no {CONFIG}: not a model of ours")
        own = self.folder / name
        own.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=own, prefix=".writing-") as writing:
            made = Path(writing) / "model"
            shutil.copytree(model, made)
            # Of folders, also those that cannot be read.
            numbers = (int(path.name) for path in own.iterdir() if path.name.isdecimal())
            number = 1 + max(numbers, default=0)
            facts = (parent, data, dict(settings or {}), dict(metrics or {}))
            version = Version(name, number, _now(), how, *facts)
            (made / VERSION).write_bytes(msgspec.json.format(msgspec.json.encode(version)))
            os.rename(made, own / f"{number:04}")  # fails where another was faster
        if not (own / CURRENT).exists():
            self.promote(f"{name}@{number}")
        return version

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def versions(self, name: str) -> list[Version]:
        """Oldest first; what cannot be read is not there."""
        return list(self._versions(name))

    def _versions(self, name: str) -> Iterator[Version]:
        for path in sorted((self.folder / name).glob(f"[0-9]*/{VERSION}")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Version)
            except (OSError, msgspec.DecodeError):
                continue

    def current(self, name: str) -> int | None:
        try:
            return int((self.folder / name / CURRENT).read_text())
        except (OSError, ValueError):
            return None

    def find(self, reference: str) -> Version | None:
        """NAME, or NAME@NUMBER; None where there is no such name. Raises ModelFileError for a
        version that is not there."""
        found = _REFERENCE.fullmatch(reference)
        if found is None or not _NAME.fullmatch(found[1]) or found[1] not in self.names():
            return None
        name, number = found[1], int(found[2]) if found[2] else self.current(found[1])
        known = {version.number: version for version in self.versions(name)}
        if number not in known:
            there = ", ".join(f"{name}@{n}" for n in known) or "none"
            raise ModelFileError(f"no version {reference}: there are {there}")
        return known[number]

    def pinned(self, reference: str) -> str:
        """What a name means now, so that it means the same later; of any other model its reference.
        Raises ModelFileError."""
        return str(self.find(reference) or reference)

    def is_adapter(self, version: Version) -> bool:
        """Or else a model by itself."""
        return (self.path(version) / ADAPTER).is_file()

    def path(self, version: Version) -> Path:
        return self.folder / version.name / f"{version.number:04}"

    def promote(self, reference: str) -> Version:
        """To be what the name alone means. Raises ModelFileError."""
        version = self._named(reference)
        own = self.folder / version.name
        unfinished = own / f".{CURRENT}"
        unfinished.write_text(f"{version.number}\n")
        os.replace(unfinished, own / CURRENT)
        return version

    def rollback(self, name: str) -> Version:
        """To the version before the current one. Raises ModelFileError."""
        now = self._named(name)
        before = [v.number for v in self.versions(name) if v.number < now.number]
        if not before:
            raise ModelFileError(f"{now} is the first version: nothing to go back to")
        return self.promote(f"{name}@{before[-1]}")

    def note(self, version: Version, found: Mapping[str, object]) -> None:
        """Keeps what was measured of it, beside it and in the order of measuring."""
        with (self.path(version) / MEASURED).open("ab") as file:
            file.write(msgspec.json.encode({"at": _now(), **found}) + b"\n")

    def notes(self, version: Version) -> list[dict[str, object]]:
        path = self.path(version) / MEASURED
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [msgspec.json.decode(line, type=dict[str, object]) for line in lines]

    def _named(self, reference: str) -> Version:
        version = self.find(reference)
        if version is None:
            there = ", ".join(self.names()) or "none yet"
            raise ModelFileError(f"no model {reference} is registered: there are {there}")
        return version


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
