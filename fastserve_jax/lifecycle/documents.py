"""Documents out of files: text, JSON lines and arrays, CSV; cleaned, and each only once.

A document is plain text, a conversation, or a text with its label. Knows no tokens.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
import zipfile
import zlib
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
            said = cleaned.text or json.dumps(cleaned.messages, sort_keys=True)
            mark = _mark(said, cleaned.label)
            if mark in seen:
                counts.repeated += 1
                continue
            seen.add(mark)
            if alike is not None and alike.has(_plain_words(said), cleaned.label):
                counts.near += 1
                continue
            yield cleaned


def clean(text: str) -> str:
    """NFC, no control characters, one space where there were several, no more than one blank
    line; ? for half a surrogate pair. Spaces that begin a line stay: code is text, too."""
    text = text.encode("utf-8", "replace").decode()
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
    return Document(clean(document.text), messages, clean(document.label).strip())


def _plain_words(said: str) -> str:
    return re.sub(r"\W+", " ", said.casefold()).strip()


def _mark(said: str, label: str) -> bytes:
    """The same of documents that differ in no more than case and spaces."""
    told = f"{' '.join(said.casefold().split())}\0{label}"
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


def _read(path: Path) -> Iterator[Document]:
    ending = path.suffix.lower()
    try:
        if ending == ".zip":
            yield from _zipped(path)
            return
        reader = _READERS.get(ending)
        if reader is None:
            known = ", ".join(filter(None, _READERS))
            raise DataError(f"{path}: what ends in {ending} is not read, but {known}, .zip are")
        with path.open(encoding=_ENCODING, newline="") as file:
            yield from reader(file, str(path))
    except (OSError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: cannot read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error


def _zipped(path: Path) -> Iterator[Document]:
    """Each file of an archive is read as it would be by itself; of other kinds, and hidden ones,
    none is."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            reader = _READERS.get(Path(name).suffix.lower())
            is_hidden = any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)
            if name.endswith("/") or is_hidden or reader is None:
                continue
            try:
                opened = archive.open(name)
            except RuntimeError as error:  # encrypted, or by a method that is not known here
                raise DataError(f"{path}!{name}: cannot read: {error}") from error
            with opened, TextIOWrapper(opened, _ENCODING, newline="") as file:
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
            yield _of_fields(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}:{number}: {error}") from error


def _array(file: IO[str], where: str) -> Iterator[Document]:
    try:
        every = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}; with an object on each line it is a .jsonl") from error
    if not isinstance(every, list):
        raise DataError(f"{where}: not an array of objects")
    for number, found in enumerate(every, 1):
        try:
            yield _of_fields(found)
        except ValueError as error:
            raise DataError(f"{where}: object {number}: {error}") from error


def _table(file: IO[str], where: str) -> Iterator[Document]:
    was = csv.field_size_limit(_MOST_CHARACTERS)  # of the whole process
    try:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                yield _of_fields({key: value or "" for key, value in row.items() if key})
            except ValueError as error:
                raise DataError(f"{where}:{number}: {error}") from error
    finally:
        csv.field_size_limit(was)


def _of_fields(found: Any) -> Document:
    """text or content, with label, category, class or intent if there is one; messages; or prompt
    and completion, instruction and output, question and answer. Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError("not an object with fields")
    if isinstance(found.get("messages"), list):
        return _talk(found["messages"])
    for asked, answered in _PAIRS:
        if asked in found and answered in found:
            both = found[asked], found[answered]
            if all(isinstance(one, list) for one in both):
                return _talk([*both[0], *both[1]])
            said = _string(found, asked)
            if found.get("input"):
                said = f"{said}\n\n{_string(found, 'input')}"
            turns = (("user", said), ("assistant", _string(found, answered)))
            return _talk([{"role": role, "content": content} for role, content in turns])
    name = next((name for name in _TEXT if name in found), None)
    if name is None:
        raise ValueError(f"no field {', '.join(_TEXT)} or messages, but {', '.join(found)[:200]}")
    return Document(_string(found, name), label=_label(found))


def _string(found: Mapping[str, Any], name: str) -> str:
    text = found[name]
    if not isinstance(text, str):
        raise ValueError(f"{name} is no text: {json.dumps(text)[:80]}")
    return text


def _label(found: Mapping[str, Any]) -> str:
    """Numbers may be labels; null is none."""
    name = next((name for name in _LABEL if found.get(name) is not None), None)
    if name is None:
        return ""
    return str(found[name]) if isinstance(found[name], int) else _string(found, name)


def _talk(messages: Iterable[Any]) -> Document:
    return Document(messages=tuple(map(_message, messages)))


def _message(one: Any) -> Message:
    if not isinstance(one, dict) or not isinstance(one.get("role"), str):
        raise ValueError("each of messages must be an object with role and content")
    return one


_ENCODING = "utf-8-sig"  # UTF-8; what marks it as such at the beginning is no text
_TEXT = ("text", "content", "sentence")
_LABEL = ("label", "category", "class", "intent")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_READERS: dict[str, Callable[[IO[str], str], Iterator[Document]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _array,
    ".csv": _table,
    ".txt": _plain,
    ".md": _plain,
    "": _plain,
}
