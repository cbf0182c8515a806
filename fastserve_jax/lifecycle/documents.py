"""Documents out of files: text, JSON lines, CSV; cleaned, and each only once.

A document is plain text, a conversation, or a text with its label. Knows no tokens.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from fastserve_jax.errors import DataError

from .near import Near

END = "<|endoftext|>"  # between the documents of a text file; without any, blank lines are
_MOST_CHARACTERS = 1 << 24  # of one document
_BLOCK_CHARACTERS = 1 << 20
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_SPACES = re.compile(r"[ \t\u00a0]+")
_BLANK = re.compile(r"\n{3,}")

type Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    text: str = ""
    messages: tuple[Message, ...] = ()
    label: str = ""


@dataclass(slots=True)
class Counts:
    """What became of what was read."""

    read: int = 0
    empty: int = 0
    repeated: int = 0
    near: int = 0  # nearly like another

    @property
    def kept(self) -> int:
        return self.read - self.empty - self.repeated - self.near


def documents(paths: Iterable[Path], counts: Counts, near: float = 0) -> Iterator[Document]:
    """Of all files in their order, cleaned, none empty, none twice and, unless `near` is 0, none as
    much like one before it. Raises DataError."""
    seen: set[bytes] = set()
    alike = Near(near) if near else None
    for path in paths:
        for found in _read(path):
            counts.read += 1
            cleaned = _cleaned(found)
            if not cleaned.text and not cleaned.messages:
                counts.empty += 1
                continue
            plain = _plain_words(cleaned)
            mark = _mark(plain, cleaned.label)
            if mark in seen:
                counts.repeated += 1
                continue
            seen.add(mark)
            if alike is not None and alike.has(plain, cleaned.label):
                counts.near += 1
                continue
            yield cleaned


def clean(text: str) -> str:
    """NFC, no control characters, one space where there were several, no more than one blank
    line. Spaces that begin a line stay: code is text, too."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    lines = (_CONTROL.sub("", line) for line in text.split("\n"))
    return _BLANK.sub("\n\n", "\n".join(map(_tidy, lines))).strip("\n")


def _tidy(line: str) -> str:
    body = line.strip()
    return line[: line.index(body[0])] + _SPACES.sub(" ", body) if body else ""


def _cleaned(document: Document) -> Document:
    messages = tuple(
        {**m, "content": clean(m["content"])} if isinstance(m.get("content"), str) else m
        for m in document.messages
    )
    return Document(clean(document.text), messages, document.label.strip())


def _plain_words(document: Document) -> str:
    """The same of documents that differ in no more than case, spaces and punctuation."""
    said = document.text or json.dumps(document.messages, sort_keys=True)
    return re.sub(r"\W+", " ", said.casefold()).strip()


def _mark(plain: str, label: str) -> bytes:
    said = f"{plain}\0{label}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(said, digest_size=16).digest()


def _read(path: Path) -> Iterator[Document]:
    ending = path.suffix.lower()
    try:
        if ending == ".zip":
            yield from _zipped(path)
            return
        reader = _READERS.get(ending, _plain)
        with path.open(encoding="utf-8", newline="") as file:
            yield from reader(file, str(path))
    except (OSError, zipfile.BadZipFile, csv.Error) as error:
        raise DataError(f"{path}: cannot read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error


def _zipped(path: Path) -> Iterator[Document]:
    """Each text file of an archive is a document; lines and tables are read as such."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            reader = _READERS.get(Path(name).suffix.lower())
            if name.endswith("/") or reader is None:
                continue
            with archive.open(name) as opened, TextIOWrapper(opened, "utf-8", newline="") as file:
                yield from reader(file, f"{path}!{name}")


def _plain(file: IO[str], where: str) -> Iterator[Document]:
    """By blocks: a file may be larger than memory, a document may not."""
    block = file.read(_BLOCK_CHARACTERS)
    apart = re.compile(re.escape(END) if END in block else r"\r?\n(?:[ \t]*\r?\n)+")
    rest = ""
    while block:
        *whole, rest = apart.split(rest + block)
        if len(rest) > _MOST_CHARACTERS:
            raise DataError(f"{where}: a document of more than {_MOST_CHARACTERS:,} characters")
        yield from (Document(one) for one in whole)
        block = file.read(_BLOCK_CHARACTERS)
    yield Document(rest)


def _lines(file: IO[str], where: str) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            yield _of_fields(found)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where}:{number}: {error}") from error


def _table(file: IO[str], where: str) -> Iterator[Document]:
    for number, row in enumerate(csv.DictReader(file), 2):
        try:
            yield _of_fields({key: value or "" for key, value in row.items() if key})
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}:{number}: {error}") from error


def _of_fields(found: Mapping[str, Any]) -> Document:
    """text or content, with label, category, class or intent if there is one; messages; or prompt
    and completion, instruction and output, question and answer."""
    if isinstance(found.get("messages"), list):
        return Document(messages=tuple(_message(one) for one in found["messages"]))
    for asked, answered in _PAIRS:
        if asked in found and answered in found:
            said = (
                f"{found[asked]}\n\n{found['input']}" if found.get("input") else str(found[asked])
            )
            turns = (("user", said), ("assistant", str(found[answered])))
            return Document(messages=tuple({"role": r, "content": c} for r, c in turns))
    text = next((found[name] for name in _TEXT if name in found), None)
    if not isinstance(text, str):
        raise ValueError(f"no field {', '.join(_TEXT)} or messages, but {', '.join(found)[:200]}")
    return Document(text, label=str(next((found[n] for n in _LABEL if n in found), "")))


def _message(one: Any) -> Message:
    if not isinstance(one, dict) or not isinstance(one.get("role"), str):
        raise ValueError("each of messages must be an object with role and content")
    return one


_TEXT = ("text", "content", "sentence")
_LABEL = ("label", "category", "class", "intent")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_READERS: dict[str, Callable[[IO[str], str], Iterator[Document]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".csv": _table,
    ".txt": _plain,
    ".md": _plain,
    "": _plain,
}
