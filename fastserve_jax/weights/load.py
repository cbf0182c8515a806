"""From what a person calls a model to its configuration and its parameters.

Parameters come one at a time, so a model never lies in memory twice. Knows nothing of devices.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.config import ModelConfig, Seq2SeqConfig
from fastserve_jax.models.precision import Stored
from fastserve_jax.weights.adapter import is_adapter, read_facts
from fastserve_jax.weights.catalogue import embedded, embedded_names, read_catalogue
from fastserve_jax.weights.encoder import EncoderFiles, is_encoder, open_encoder, unpacked
from fastserve_jax.weights.gguf import GgufFile
from fastserve_jax.weights.gguf_config import read_config
from fastserve_jax.weights.hub import fetch_snapshot
from fastserve_jax.weights.huggingface import Folder
from fastserve_jax.weights.huggingface_config import read_config_file, read_sampling
from fastserve_jax.weights.names import Names
from fastserve_jax.weights.orbax import Checkpoint, is_checkpoint, read_model_config
from fastserve_jax.weights.pull import Progress, fetch, silent
from fastserve_jax.weights.registry import REGISTRY, Registry

_AHEAD = 1  # parameters made ready while one is in use, by a thread


type Rows = tuple[int, int]  # from, to


class TensorSource(Protocol):
    """Stored tensors by name; reading one, or some of its rows, may take a while."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, object]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: Rows | None = None) -> NDArray[Any]: ...


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model whose files are all here.

    `tokenizer_source` is the GGUF's tokenizer.* metadata, or the folder. `sampling` is what the
    model's makers advise where a request leaves temperature, top_p, top_k, min_p or
    repetition_penalty out. `int8_perplexity` is what int8 makes of bf16's, None if unknown.
    """

    name: str
    path: Path
    config: ModelConfig
    licence: str
    notice: str
    tokenizer_source: Path | Mapping[str, object]
    sampling: Mapping[str, float]
    _source: TensorSource = field(repr=False)
    _names: Names = field(repr=False)
    int8_perplexity: float | None = None

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Matrices that are kept in fewer bits, as `fastserve compress` writes them."""
        return self._source.stored if isinstance(self._source, Checkpoint) else {}

    def as_stored(self, matrix: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Weight and scale of one of those, as they are."""
        assert isinstance(self._source, Checkpoint)
        return self._source.read_stored(matrix)

    @property
    def size_bytes(self) -> int:
        """Of all that is stored."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def tensors(
        self, shapes: Mapping[str, tuple[int, ...]], but: Collection[str] = ()
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yields every parameter of `shapes` by name, `but` those: float32, or float16/bfloat16 as
        stored.

        Raises ModelFileError before the first one if any is missing or a stored tensor would be
        left over, and at the parameter itself if its shape is another.
        """
        wanted = self.check_complete(shapes)
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
            ahead: deque[tuple[str, Future[NDArray[Any]]]] = deque()
            try:
                for name, stored in wanted.items():
                    if name in but:
                        continue
                    ahead.append((name, pool.submit(self._assemble, stored)))
                    if len(ahead) > _AHEAD:
                        yield self._checked(*ahead.popleft(), shapes)
                while ahead:
                    yield self._checked(*ahead.popleft(), shapes)
            finally:
                for _, future in ahead:
                    future.cancel()

    def _stored(self, name: str) -> tuple[tuple[str, str], ...]:
        """(stored name, its stem in the table) of each part of a parameter."""
        layer = re.search(r"\.(\d+)\.", name)
        number = layer.group(1) if layer else ""
        stem, _, ending = name.rpartition(".")
        pattern = stem.replace(f".{number}.", ".{i}.", 1) if layer else stem
        assert pattern in self._names.parts, f"no rule for {name} in {self._names.parts.keys()}"
        stored = []
        for part in self._names.parts[pattern]:
            known = part.replace("{i}", number)
            count = self.config.num_experts if "{e}" in part else 1
            stored += [(f"{known.replace('{e}', str(e))}.{ending}", part) for e in range(count)]
        return tuple(stored)

    def blocks(
        self,
        name: str,
        shape: tuple[int, ...],
        most_bytes: int,
        wants: Callable[[int, int], bool],
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """A parameter by blocks: (row of the whole that the block begins with, its rows). One that
        `wants` does not want, by its first row and their number, may not be read. Raises
        ModelFileError as `tensors` does."""
        first = 0
        for stored, stem in self._stored(name):
            if stem in self._names.transforms:  # which knows wholes only
                whole = self._assemble(((stored, stem),))
                stored_shape, blocks = whole.shape, iter([(0, whole)])
            elif stem in self._names.experts:
                found = self._source.shape(stored)
                if not 2 <= len(found) <= 3:
                    raise self._misfit(name, found, shape)
                *several, out, size = found
                stored_shape = (several[0] if several else 1, size, out)
                blocks = self._experts_of(stored, stored_shape[0], first, wants, found)
            else:
                stored_shape = self._source.shape(stored)
                blocks = self._blocks_of(stored, most_bytes, first, wants)
            if stored_shape[1:] != shape[1:] or first + stored_shape[0] > shape[0]:
                raise self._misfit(name, (first + stored_shape[0], *stored_shape[1:]), shape)
            for row, block in blocks:
                yield first + row, block
            first += stored_shape[0]
        if first != shape[0]:
            raise self._misfit(name, (first, *shape[1:]), shape)

    def _blocks_of(
        self, stored: str, most_bytes: int, first: int, wants: Callable[[int, int], bool]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        rows, *others = self._source.shape(stored)
        count = max(1, most_bytes // (4 * math.prod(others)))
        for row in range(0, rows, count):
            stop = min(row + count, rows)
            if wants(first + row, stop - row):
                yield row, self._source.read(stored, (row, stop))

    def _experts_of(
        self,
        stored: str,
        count: int,
        first: int,
        wants: Callable[[int, int], bool],
        shape: tuple[int, ...],
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """One after the other."""
        for expert in range(count):
            if wants(first + expert, 1):
                rows = (expert, expert + 1) if len(shape) == 3 else (0, shape[0])
                yield expert, _expert(self._source.read(stored, rows))

    def check_complete(self, names: Iterable[str]) -> dict[str, tuple[tuple[str, str], ...]]:
        """What each is stored as. Raises ModelFileError if any of it is missing, or would be left
        over."""
        wanted = {name: self._stored(name) for name in names}
        used = {stored for parts in wanted.values() for stored, _ in parts}
        present = self._source.tensors.keys()
        missing = sorted(used - present)
        if self.config.tied_head:  # a copy of the embedding may be stored all the same
            used.update(f"{stem}.weight" for stem in self._names.parts["head"])
        if missing:
            raise ModelFileError(f"{self.path}: {_counted(missing, 'tensor')} missing")
        spare = sorted(name for name in present - used if not name.endswith(self._names.unused))
        if spare:
            raise ModelFileError(
                f"{self.path}: {_counted(spare, 'tensor')} unknown to {self.config.family}"
            )
        return wanted

    def _assemble(self, stored: tuple[tuple[str, str], ...]) -> NDArray[Any]:
        try:
            parts = []
            for name, stem in stored:
                part = self._source.read(name)
                transform = self._names.transforms.get(stem)
                part = transform(part, self.config) if transform else part
                parts.append(_expert(part) if stem in self._names.experts else part)
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        except ValueError as error:  # a reshape or a concatenation that does not work out
            names = ", ".join(name for name, _ in stored)
            raise ModelFileError(f"{self.path}: {names} do not fit: {error}") from error

    def _checked(
        self,
        name: str,
        future: Future[NDArray[Any]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> tuple[str, NDArray[Any]]:
        array = future.result()
        if array.shape != tuple(shapes[name]):
            raise self._misfit(name, array.shape, shapes[name])
        return name, array

    def _misfit(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> ModelFileError:
        stored = " + ".join(part for part, _ in self._stored(name))
        return ModelFileError(f"{self.path}: {stored} makes {name} {found}, expected {wanted}")


def _expert(matrix: NDArray[Any]) -> NDArray[Any]:
    """[out, in], or several of them -> [experts, in, out]."""
    return (matrix if matrix.ndim == 3 else matrix[None]).swapaxes(1, 2)


def _counted(names: list[str], noun: str) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{noun}{'s' if len(names) > 1 else ''} {shown} {'are' if len(names) > 1 else 'is'}"


def open_model(reference: str, cache_dir: Path, progress: Progress = silent) -> ModelFiles:
    """Opens a model by catalogue name, registered name (`stories@2`), `.gguf` file, folder of
    Hugging Face's or our own, or `hf:org/name`.

    A name of the catalogue is pulled into `cache_dir` unless it is there; `progress` hears of it.
    Raises ModelFileError for what cannot be found or read, PullFailed for a download.
    """
    catalogue = read_catalogue()
    if reference in catalogue:
        entry = catalogue[reference]
        if entry.is_encoder:
            raise ModelFileError(f"{reference} is an encoder: it writes no text")
        model = open_gguf(fetch(entry, cache_dir, progress), entry.name)
        assert isinstance(model.tokenizer_source, Mapping)
        template = {"tokenizer.chat_template": entry.chat_template} if entry.chat_template else {}
        return replace(
            model,
            licence=entry.licence,
            notice=entry.notice,
            sampling=entry.sampling,
            int8_perplexity=entry.int8_perplexity,
            tokenizer_source={**model.tokenizer_source, **template},
        )
    if (own := embedded(reference)) is not None:
        return open_folder(own, reference)
    registry = Registry(cache_dir / REGISTRY)
    if (version := registry.find(reference)) is not None:
        return open_folder(registry.path(version), str(version))
    if reference.startswith("hf:"):
        name = reference.removeprefix("hf:")
        return open_folder(fetch_snapshot(name), name)
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path):  # unlike Path's this takes whatever a client has sent
        return open_folder(path.resolve(), path.resolve().name)
    if os.path.isfile(path):
        return open_gguf(path.resolve(), path.stem)
    near = difflib.get_close_matches(reference.lower(), catalogue, n=3, cutoff=0.4)
    raise ModelFileError(
        f"no model {reference!r:.100}: not a file, a folder or hf:org/name; the catalogue has "
        + ", ".join(near or sorted([*catalogue, *embedded_names()]))
    )


def find_encoder(
    reference: str, cache_dir: Path, progress: Progress = silent
) -> EncoderFiles | None:
    """A model named as for `open_model`, if it is an encoder; None for any other."""
    entry = read_catalogue().get(reference)
    if entry is not None:
        if not entry.is_encoder:
            return None
        return open_encoder(unpacked(fetch(entry, cache_dir, progress)), entry.name)
    registry = Registry(cache_dir / REGISTRY)
    version = registry.find(reference)
    path = Path(os.path.expanduser(reference)) if version is None else registry.path(version)
    if not os.path.isdir(path) or not is_encoder(path):
        return None
    return open_encoder(path.resolve(), path.resolve().name if version is None else str(version))


def named(text: str) -> tuple[str, str]:
    """NAME=REFERENCE: what clients call a model, and what it is. Without a name it is called what
    its file or folder is, or else as it is written: `stories`, `stories@2`."""
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return path.resolve().name, text
    if os.path.isfile(path):
        return path.stem, text
    name, equals, reference = text.partition("=")
    return (name, reference) if equals else (text.removeprefix("hf:"), text)


def open_config(
    reference: str, cache_dir: Path, progress: Progress = silent
) -> tuple[str, ModelConfig]:
    """Name and shape of a model named as for `open_model`, or of a config.json by itself. Of a
    folder and of the hub nothing else is read."""
    path = Path(reference).expanduser()
    if reference.startswith("hf:"):
        name = reference.removeprefix("hf:")
        return name, read_config_file(fetch_snapshot(name, ("config.json",)) / "config.json")[0]
    if path.is_dir():
        return path.resolve().name, _config_of(path)[0]
    if path.suffix == ".json" and path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return name, _with_experts_checked(path, *read_config_file(path))[0]
    files = open_model(reference, cache_dir, progress)
    return files.name, files.config


def _config_of(folder: Path) -> tuple[ModelConfig, Names]:
    own = is_checkpoint(folder)
    read = read_model_config(folder) if own else read_config_file(folder / "config.json")
    return _with_experts_checked(folder, *read)


def _with_experts_checked(
    path: Path, config: ModelConfig, names: Names
) -> tuple[ModelConfig, Names]:
    if config.num_experts and not 1 <= config.experts_per_token <= config.num_experts:
        raise ModelFileError(
            f"{path}: {config.experts_per_token} of {config.num_experts} experts for each token"
        )
    return config, names


def open_gguf(path: Path, name: str) -> ModelFiles:
    """Opens a GGUF file. Raises ModelFileError."""
    file = GgufFile(path)
    config, names = _with_experts_checked(path, *read_config(file))
    licence = file.metadata.get("general.license")
    return ModelFiles(
        name=name,
        path=path,
        config=config,
        licence=licence if isinstance(licence, str) else "",
        notice="",
        tokenizer_source={
            key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")
        },
        sampling={},
        _source=file,
        _names=names,
    )


def open_folder(path: Path, name: str) -> ModelFiles:
    """Opens a folder of Hugging Face's, or one of our own. Raises ModelFileError."""
    if is_encoder(path):
        what = "says labels" if is_checkpoint(path) else "is an encoder"
        raise ModelFileError(f"{name} {what}: it writes no text")
    if is_adapter(path):
        base, (short, at, _) = read_facts(path).base_model_name_or_path or "", name.partition("@")
        raise ModelFileError(
            f"{name} is an adapter{base and f' of {base}'}: fastserve serve {base or 'MODEL'} "
            f"--adapter {short}={name if at else path}"
        )
    config, names = _config_of(path)
    has_encoder = isinstance(config, Seq2SeqConfig)
    source = Checkpoint(path) if is_checkpoint(path) else Folder(path, names)
    if has_encoder and not config.tied_head:  # what Transformers 5 draws is tied all the same
        config = replace(config, tied_head="lm_head.weight" not in source.tensors)
    return ModelFiles(
        name=name,
        path=path,
        config=config,
        licence="",
        notice="",
        tokenizer_source=path,
        # Of an encoder-decoder the likeliest is wanted, unless its makers say otherwise.
        sampling={**({"temperature": 0.0} if has_encoder else {}), **read_sampling(path)},
        _source=source,
        _names=names,
    )
