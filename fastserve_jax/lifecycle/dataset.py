"""A prepared folder: what is in it, and its rows in an order that can be taken up at any step.

    dataset.json   what was made of what, last to be written: without it a folder is unfinished
    tokenizer/     the files of its vocabulary
    train/ valid/  tokens.npy, segments.npy, learned.npy [rows, context]; of labelled texts
                   tokens.npy, lengths.npy, labels.npy

Arrays are mapped, never pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import DataError

FACTS, TOKENIZER = "dataset.json", "tokenizer"
TRAIN, VALID = "train", "valid"
ARRAYS = {"text": ("tokens", "segments", "learned"), "labels": ("tokens", "lengths", "labels")}

type Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Facts:
    kind: str  # of ARRAYS
    context: int
    vocab_size: int
    train_rows: int
    valid_rows: int
    tokens: int  # that are learned, of both
    documents: int
    repeated: int  # documents left out
    empty: int
    fingerprint: str  # of sources and settings
    labels: tuple[str, ...] = ()
    near: int = 0  # documents left out because they were nearly like another
    cut: int = 0  # documents longer than a row, of which only the beginning is here
    unanswered: int = 0  # conversations left out: no answer in what fits a row


class Dataset:
    def __init__(self, folder: Path) -> None:
        """Raises DataError."""
        self.folder = folder
        path = folder / FACTS
        try:
            self.facts = msgspec.json.decode(path.read_bytes(), type=Facts)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: no {FACTS}: `fastserve data prepare` makes one, and goes on with what "
                "it had not finished"
            ) from error
        except (OSError, msgspec.DecodeError) as error:
            raise DataError(f"{path}: cannot read: {error}") from error

    def arrays(self, part: str) -> Batch:
        found = {}
        for name in ARRAYS[self.facts.kind]:
            path = self.folder / part / f"{name}.npy"
            try:
                found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot read: {error}") from error
        rows = {len(array) for array in found.values()}
        if rows != {getattr(self.facts, f"{part}_rows")}:
            raise DataError(f"{self.folder / part}: {sorted(rows)} rows, not what {FACTS} says")
        return found

    def batches(self, part: str, rows: int, seed: int | None) -> Any:
        """Endless batches of so many rows in an order that `seed` gives, other in each round; a
        grain iterator, whose state says where it is. None goes through all once, in their order,
        the last batch smaller."""
        import grain

        source = _Source(self.arrays(part))
        if len(source) < rows and seed is not None:
            raise DataError(
                f"{self.folder / part}: {len(source)} rows make no batch of {rows}: take a smaller "
                "batch, a shorter context or more text"
            )
        data = grain.MapDataset.source(source)
        if seed is None:
            return iter(data.batch(rows, drop_remainder=False))
        data = data.seed(seed).shuffle().repeat()
        return iter(data.batch(rows, drop_remainder=True).to_iter_dataset(_no_threads()))


def _no_threads() -> Any:
    import grain

    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True, slots=True)
class _Source:
    arrays: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, row: Any) -> dict[str, NDArray[Any]]:
        return {name: np.asarray(array[row]) for name, array in self.arrays.items()}
