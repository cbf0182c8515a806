"""Recorded requests from a file, whatever it is called: the format is seen from its content.

Knows files and their columns; nothing of policies or devices. Nothing is shuffled.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from ..errors import ConfigError
from .workload import MOST_TOKENS, Workload

# Headers of traces we have met, in small letters and without anything between them.
_TIME = re.compile(r"(t|time|timestamp|arrival|arrivaltime|arrivaltimestamp|arrivedat)(s|ms)?")
_PROMPT = re.compile(r"(num)?(context|input|request|prompt|prefill)(tokens|toks|length|len)")
_OUTPUT = re.compile(r"(num)?(generated|output|response|completion|decode)(tokens|toks|length|len)")
_CLIENT = re.compile(r"(client|user|tenant)(id)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Rows:
    """What a file says, in its order."""

    times_s: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)


def read_trace(path: Path, seed: int = 0, n: int | None = None) -> Workload:
    """`n` requests of the trace (all without it): those from its beginning for seed 0, the next
    ones for seed 1, and so on; seeds beyond its end take a place by chance.

    Rows that ask for no output are dropped and counted; a prompt has one token at least. Raises
    ConfigError with file and line.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(b"\x93NUMPY"):
            whole = _lengths(path, seed)
        elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            whole = _workload(path, _json_lines(path))
        else:
            whole = _workload(path, _table(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: --trace wants a file of requests") from error
    if n is None or n >= len(whole):
        return whole
    start = seed * n
    if start + n > len(whole):
        start = int(np.random.default_rng(seed).integers(len(whole) - n + 1))
    return whole.window(start, n)


def _workload(path: Path, rows: _Rows) -> Workload:
    outputs = np.array(rows.outputs, np.int64)
    times_s = np.array(rows.times_s, np.float64)
    # Files are written as requests end, or by several writers: by arrival, ties as they stand.
    chosen = np.flatnonzero(outputs > 0)
    chosen = chosen[np.argsort(times_s[chosen], kind="stable")]
    if not len(chosen):
        raise ConfigError(f"{path}: no row asks for output: this is no trace of requests")
    return Workload(
        name=path.stem,
        arrival_s=times_s[chosen] - times_s[chosen[0]],
        prompt_tokens=np.maximum(1, np.array(rows.prompts, np.int64)[chosen]),
        output_tokens=outputs[chosen],
        blocks=tuple(rows.blocks[i] for i in chosen) if any(rows.blocks) else None,
        clients=tuple(rows.clients[i] for i in chosen) if rows.clients else None,
        dropped=len(outputs) - len(chosen),
    )


# CSV with a header: Azure, ServeGen, BurstGPT and what looks like them


def _table(path: Path) -> _Rows:
    rows = _Rows()
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            parse = _row_parser(path, header)
            for fields in reader:
                line = reader.line_num
                if fields:
                    parse(fields, line, rows)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: neither CSV, JSON lines nor .npy: see fastserve simulate --help"
        ) from error
    except csv.Error as error:
        raise ConfigError(f"{path}, line {line}: {error}") from error
    return rows


def _row_parser(path: Path, header: list[str]) -> Callable[[list[str], int, _Rows], None]:
    """What books one row; the columns are found by their names."""
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]

    def column(known: re.Pattern[str], example: str) -> int:
        for place, name in enumerate(names):
            if known.fullmatch(name):
                return place
        shown = ", ".join(header)[:120] or "nothing"
        raise ConfigError(
            f"{path}, line 1: no column like {example!r}: the first line must name the columns, "
            f"and is {shown!r}"
        )

    time = column(_TIME, "timestamp")
    prompt, output = column(_PROMPT, "input_tokens"), column(_OUTPUT, "output_tokens")
    client = next((i for i, name in enumerate(names) if _CLIENT.fullmatch(name)), None)
    unit_s = 1e-3 if names[time].endswith("ms") else 1.0

    def parse(fields: list[str], line: int, rows: _Rows) -> None:
        if len(fields) != len(header):
            raise ConfigError(
                f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}: "
                "mend or remove the line"
            )
        try:
            rows.times_s.append(_clock_s(fields[time]) * unit_s)
            rows.prompts.append(_count(fields[prompt]))
            rows.outputs.append(_count(fields[output]))
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: {error}: mend or remove the line") from error
        if client is not None:
            rows.clients.append(fields[client])

    return parse


def _clock_s(text: str) -> float:
    """A number, or a date with time; only differences matter, so any zone will do."""
    try:
        number = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"{text[:40]!r} is no time") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return (moment - _EPOCH).total_seconds()
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]!r} is no time")
    return number


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 <= number <= MOST_TOKENS and number % 1 == 0):
        raise ValueError(f"{text[:40]!r} is no number of tokens (0 to {MOST_TOKENS:,})")
    return int(number)


# JSON lines: Mooncake


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _Line(msgspec.Struct):
    timestamp: float  # ms
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[int, ...] = ()


def _json_lines(path: Path) -> _Rows:
    rows = _Rows()
    decoder = msgspec.json.Decoder(_Line)
    for number, line in _numbered(path):
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}, line {number}: {error}: a line has timestamp (ms), input_length, "
                "output_length and perhaps hash_ids"
            ) from error
        rows.times_s.append(row.timestamp / 1e3)
        rows.prompts.append(row.input_length)
        rows.outputs.append(row.output_length)
        rows.blocks.append(row.hash_ids)
    return rows


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.strip(b"\xef\xbb\xbf \t\r\n")
            if text:
                yield number, text


# Two columns of lengths and no times


def _lengths(path: Path, seed: int) -> Workload:
    """Arrivals are Poisson, by seed; how many a second is not the file's to say."""
    try:
        # Mapped, so that a header that promises more than the file has costs nothing.
        lengths = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{path}: not a whole .npy array of numbers: {error}") from error
    if lengths.ndim != 2 or lengths.shape[1] != 2 or lengths.dtype.kind not in "iu":
        raise ConfigError(
            f"{path}: an array of {lengths.dtype}, shape {lengths.shape}: a row must be the "
            "prompt's and the output's tokens, as integers"
        )
    table = lengths.astype(np.int64)
    if len(table) and not (table.min() >= 0 and table.max() <= MOST_TOKENS):
        raise ConfigError(f"{path}: token counts are 0 to {MOST_TOKENS:,}")
    rows = _Rows([0.0] * len(table), table[:, 0].tolist(), table[:, 1].tolist())
    whole = _workload(path, rows)
    gaps_s = np.random.default_rng([seed, 0]).exponential(1.0, len(whole))
    arrival_s = np.cumsum(gaps_s) - gaps_s[0]
    return replace(whole, arrival_s=arrival_s, timed=False)
