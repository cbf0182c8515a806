"""`fastserve data prepare`: files of text to a folder that a model is trained on.

Goes in parts, each written when it is done, so that what was interrupted goes on where it stood;
the same files and settings make the same folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ConfigError, DataError, InvalidRequest
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.text.wordpiece import WordPiece, is_wordpiece, load_wordpiece

from .dataset import ARRAYS, FACTS, TOKENIZER, TRAIN, VALID, Dataset, Facts
from .documents import Counts, Document, documents
from .packing import Packer, end_token, piece_of
from .vocabulary import copy_vocabulary, train_vocabulary, vocabulary_files

_PARTS = ".parts"
_PART_DOCUMENTS = 2000
_FORM = 2  # of what is made: another number, and what was begun is not gone on with

type Source = Path | Mapping[str, object]  # of a tokenizer
type Arrays = dict[str, NDArray[Any]]
type Progress = Callable[[str, int], None]  # stage, documents


@dataclass(frozen=True, slots=True)
class Wanted:
    """`vocabulary` is kind:size, to be trained; empty where a tokenizer is given."""

    context: int = 512
    vocabulary: str = ""
    holdout: float = 0.01  # of documents, to measure with
    kind: str = "text"
    near: float = 0.0  # how much alike two documents are, of which one is left out; 0: they stay

    def __post_init__(self) -> None:
        if self.context < 8:
            raise ConfigError(f"a context of {self.context} is too short: 8 at the least")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout is a share of the documents, not {self.holdout}")
        if not 0 <= self.near <= 1:
            raise ConfigError(f"near is a similarity from 0 to 1, not {self.near}")
        if self.kind not in ARRAYS:
            raise ConfigError(f"no kind {self.kind}: there are {', '.join(ARRAYS)}")


def prepare(
    files: Sequence[Path],
    folder: Path,
    wanted: Wanted,
    tokenizer: Source | None = None,
    progress: Progress = lambda *_: None,
) -> Facts:
    """Raises DataError and ConfigError. What is there already and of the same files, settings and
    tokenizer is kept."""
    if not files:
        raise DataError("no files: name some text, JSONL or CSV")
    if (tokenizer is None) != bool(wanted.vocabulary):
        raise ConfigError(
            "say either whose --tokenizer to take, or what --vocabulary to train: bpe:4096"
        )
    mark = _fingerprint(files, wanted, tokenizer)
    if (folder / FACTS).exists():
        known = Dataset(folder).facts
        if known.fingerprint == mark:
            return known
        raise DataError(f"{folder} has another dataset: take another folder, or delete it")
    try:
        return _make(files, folder, wanted, mark, tokenizer, progress)
    except OSError as error:
        raise DataError(f"{folder}: cannot write: {error.strerror or error}") from error


def _make(
    files: Sequence[Path],
    folder: Path,
    wanted: Wanted,
    mark: str,
    tokenizer: Source | None,
    progress: Progress,
) -> Facts:
    parts = folder / _PARTS / mark
    parts.mkdir(parents=True, exist_ok=True)
    words = parts / TOKENIZER
    if not words.is_dir():
        written = parts / f".{TOKENIZER}"
        if tokenizer is None:
            _train(files, written, wanted, progress)
        else:
            copy_vocabulary(tokenizer, written)
        os.replace(written, words)
    counts, labels = Counts(), _labels(files) if wanted.kind == "labels" else ()
    maker = _maker(wanted, words, labels)
    several = batched(documents(files, counts, wanted.near), _PART_DOCUMENTS)
    names = [_part(parts, number, some, maker) for number, some in _told(several, progress)]
    rows = {part: _join(names, part, folder, wanted.kind) for part in (TRAIN, VALID)}
    unanswered = _sum(names, "unanswered")
    kept = counts.kept - unanswered
    if not rows[TRAIN]:
        raise DataError(f"nothing to train on: of {counts.read} documents {kept} are kept")
    facts = Facts(
        kind=wanted.kind,
        context=wanted.context,
        vocab_size=maker.tokenizer.vocab_size,
        train_rows=rows[TRAIN],
        valid_rows=rows[VALID],
        tokens=sum(_learned(folder, part, wanted.kind) for part in (TRAIN, VALID)),
        documents=kept,
        repeated=counts.repeated,
        empty=counts.empty,
        fingerprint=mark,
        labels=labels,
        near=counts.near,
        cut=_sum(names, "cut"),
        unanswered=unanswered,
    )
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)  # one that was not finished with
    shutil.copytree(words, folder / TOKENIZER)
    _write(folder / FACTS, msgspec.json.format(msgspec.json.encode(asdict(facts))))
    shutil.rmtree(folder / _PARTS)
    return facts


def _fingerprint(files: Sequence[Path], wanted: Wanted, tokenizer: Source | None) -> str:
    words = {} if tokenizer is None else vocabulary_files(tokenizer)
    marks = [(name, hashlib.blake2b(data).hexdigest()) for name, data in sorted(words.items())]
    found = hashlib.blake2b(repr((_FORM, wanted, marks)).encode(), digest_size=8)
    for path in files:
        try:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}") from error
    return found.hexdigest()


def _train(files: Sequence[Path], folder: Path, wanted: Wanted, progress: Progress) -> None:
    kind, _, size = wanted.vocabulary.partition(":")
    if not size.isdecimal():
        raise ConfigError(f"no size in --vocabulary {wanted.vocabulary}: say, bpe:4096")
    progress("learning a vocabulary", 0)
    texts = (text for document in documents(files, Counts()) for text in _texts(document))
    train_vocabulary(texts, kind, int(size), folder)


def _texts(document: Document) -> Iterator[str]:
    if document.text:
        yield document.text
    for message in document.messages:
        if isinstance(message.get("content"), str):
            yield message["content"]


def _labels(files: Sequence[Path]) -> tuple[str, ...]:
    found = {document.label for document in documents(files, Counts())}
    if "" in found or len(found) < 2:
        raise DataError("every text needs a label, and there must be two at the least")
    return tuple(sorted(found))


def _told(
    several: Iterator[tuple[Document, ...]], progress: Progress
) -> Iterator[tuple[int, tuple[Document, ...]]]:
    done = 0
    for number, some in enumerate(several):
        yield number, some
        done += len(some)
        progress("tokens", done)


def _maker(wanted: Wanted, folder: Path, labels: tuple[str, ...]) -> _Maker:
    if labels and is_wordpiece(folder):
        return _Maker(wanted, load_wordpiece(folder), None, 0, labels)
    tokenizer = load_tokenizer(folder)
    return _Maker(wanted, tokenizer, ChatTemplate(tokenizer), end_token(tokenizer), labels)


@dataclass(frozen=True, slots=True)
class _Maker:
    wanted: Wanted
    tokenizer: Tokenizer | WordPiece
    template: ChatTemplate | None
    end: int
    labels: tuple[str, ...]

    def arrays(self, some: Sequence[Document]) -> Arrays:
        """Named as {part}.{array}."""
        made: Arrays = {}
        held = [self._is_held_out(document) for document in some]
        make = self._labelled if self.labels else self._packed
        for part, is_held in ((TRAIN, False), (VALID, True)):
            own = [d for d, h in zip(some, held, strict=True) if h == is_held]
            made |= {f"{part}.{name}": array for name, array in make(own).items()}
        return made

    def _is_held_out(self, document: Document) -> bool:
        said = f"{document.text}{document.messages}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())
        return number < self.wanted.holdout * 2**64

    def _packed(self, some: Sequence[Document]) -> Arrays:
        assert isinstance(self.tokenizer, Tokenizer), "words of an encoder have labels"
        assert self.template is not None
        packer = Packer(self.wanted.context)
        for document in some:
            try:
                piece = piece_of(document, self.tokenizer, self.template, self.end)
            except InvalidRequest as error:
                raise DataError(f"{str(document)[:80]}: {error}") from error
            packer.add(piece, whole=bool(document.messages))
        return packer.rows()._asdict() | _counts(packer.cut, packer.unanswered)

    def _labelled(self, some: Sequence[Document]) -> Arrays:
        context = self.wanted.context
        tokens = np.zeros((len(some), context), np.uint32)
        lengths, labels = np.zeros(len(some), np.int32), np.zeros(len(some), np.int32)
        cut = 0
        for row, document in enumerate(some):
            ids = self.tokenizer.encode(document.text)
            if len(ids) > context:  # what ends it stays: an encoder has a mark there
                ids = [*ids[: context - 1], ids[-1]]
                cut += 1
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            labels[row] = self.labels.index(document.label)
        return {"tokens": tokens, "lengths": lengths, "labels": labels} | _counts(cut, 0)


def _counts(cut: int, unanswered: int) -> Arrays:
    return {"cut": np.array(cut), "unanswered": np.array(unanswered)}


def _sum(parts: Sequence[Path], count: str) -> int:
    total = 0
    for path in parts:
        with np.load(path, allow_pickle=False) as stored:
            total += sum(int(stored[f"{name}.{count}"]) for name in (TRAIN, VALID))
    return total


def _part(folder: Path, number: int, some: Sequence[Document], maker: _Maker) -> Path:
    path = folder / f"{number:06}.npz"
    if not path.exists():
        made = maker.arrays(some)
        unfinished = path.with_suffix(".tmp.npz")
        np.savez(unfinished, **made)  # type: ignore[arg-type]
        os.replace(unfinished, path)
    return path


def _join(parts: Sequence[Path], name: str, folder: Path, kind: str) -> int:
    (folder / name).mkdir(exist_ok=True)
    rows = 0
    for array in ARRAYS[kind]:
        found = []
        for path in parts:
            with np.load(path, allow_pickle=False) as stored:
                found.append(stored[f"{name}.{array}"])
        whole = np.concatenate(found)
        rows = len(whole)
        np.save(folder / name / f"{array}.npy", whole)
    return rows


def _learned(folder: Path, part: str, kind: str) -> int:
    array = np.load(
        folder / part / f"{ARRAYS[kind][2 if kind == 'text' else 1]}.npy", mmap_mode="r"
    )
    return int(array.sum())


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
