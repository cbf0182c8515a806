"""The adapters that are loaded beside a model, by name: read, put on the device, and given up.

Loading one compiles nothing: it fills one of the places that the step has room for. A place is free
again when no request goes on with what was there. Knows no route.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from .core.types import Adapter
from .errors import FastServeError, InvalidRequest, ModelFileError, ModelNotFound
from .models.adapters import AdapterRoom
from .models.config import ModelConfig
from .weights.adapter import find_adapter
from .weights.adapter_arrays import read_adapter


class Engine(Protocol):
    """What requests go through."""

    @property
    def adapters_in_use(self) -> set[int]: ...
    def add_adapter(self, adapter: Adapter, arrays: Any, /) -> None: ...
    def drop_adapter(self, adapter: Adapter, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    adapter: Adapter
    reference: str
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds


class LoadedAdapters:
    """Of one engine; every method runs on its loop. `wanted` has references by name: what is to be
    loaded, and kept true for whatever takes the engine's place."""

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        room: AdapterRoom,
        dtype: DTypeLike,
        cache_dir: Path,
        wanted: dict[str, str],
    ) -> None:
        self._engine, self._config, self._room = engine, config, room
        self._dtype, self._cache_dir = dtype, cache_dir
        self._wanted = wanted
        self.loaded: dict[str, Loaded] = {}
        self._serials = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()

    async def load_wanted(self) -> None:
        """And nothing else, whatever is asked of the engine before this one meanwhile. Raises as
        `load` does."""
        while True:
            for name, own in list(self.loaded.items()):
                if self._wanted.get(name) != own.reference:
                    self._drop(name)
            missing = next((name for name in self._wanted if name not in self.loaded), None)
            if missing is None:
                return
            reference = self._wanted[missing]
            try:
                await self._load(missing, reference)
            except FastServeError:
                if self._wanted.get(missing) == reference:
                    raise

    async def load(self, name: str, reference: str) -> None:
        """A folder in PEFT's format, or a registered adapter. Raises InvalidRequest where the name
        is taken or no place is free, ModelNotFound where there is no such thing, ModelFileError
        and ConfigError for what cannot be served; and has then changed nothing."""
        if name in self._wanted:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded.", param="lora_name"
            )
        self._wanted[name] = reference  # whatever takes the engine's place meanwhile has it, too
        try:
            async with self._one_at_a_time:
                await self._load(name, reference)
        except BaseException:
            self._wanted.pop(name, None)
            raise

    async def _load(self, name: str, reference: str) -> None:
        self._free_index()  # or else it is not worth reading
        arrays = await asyncio.to_thread(self._read, reference)
        adapter = Adapter(self._free_index(), next(self._serials))
        self._engine.add_adapter(adapter, arrays)
        self.loaded[name] = Loaded(adapter, reference)

    def unload(self, name: str) -> None:
        """Raises ModelNotFound."""
        if name not in self.loaded:
            raise ModelNotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
        self._drop(name)
        self._wanted.pop(name, None)

    def _drop(self, name: str) -> None:
        self._engine.drop_adapter(self.loaded.pop(name).adapter)

    def _free_index(self) -> int:
        places, used = range(1, self._room.count + 1), self._engine.adapters_in_use
        free = next((index for index in places if index not in used), None)
        if free is None:
            busy = self._room.count - len(self.loaded)
            ending = f", {busy} of which requests still go on with" if busy else ""
            raise InvalidRequest(
                f"there is room for {self._room.count} adapters{ending}: unload one, or start the "
                "server with more (--set lora.max_adapters=N)",
                param="lora_name",
            )
        return free

    def _read(self, reference: str) -> Any:
        """On the device, so that nobody's step waits for the copy."""
        try:
            folder = find_adapter(reference, self._cache_dir)
        except ModelFileError as error:
            raise ModelNotFound(error.message, param="lora_path") from error
        return jax.device_put(read_adapter(folder, self._config, self._room.rank, self._dtype))
