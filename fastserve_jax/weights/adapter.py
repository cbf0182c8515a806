"""Adapters in PEFT's format: found, understood and written.

    adapter_config.json         rank, alpha, and what they are of
    adapter_model.safetensors   base_model.model.STEM.lora_A.weight [rank, in], lora_B [out, rank]

A stem is the model's in a Hugging Face folder, whatever file the model itself came from. What would
give other numbers than PEFT's is refused. Knows no device.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fastserve_jax.errors import ConfigError, ModelFileError
from fastserve_jax.models.adapters import matrices
from fastserve_jax.models.config import ModelConfig

from .hub import fetch_snapshot
from .names import HF_OF_FAMILY
from .registry import ADAPTER, REGISTRY, Registry

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_DRAWN = ("gaussian", "eva", "orthogonal")  # ways to begin that leave the model as it was

type Array = Any  # of numpy, where the decoder has its own
type Halves = tuple[Array, Array]  # [rank, in] and [out, rank], its scale in the second


class AdapterFacts(msgspec.Struct, kw_only=True):
    """What adapter_config.json says of how its tensors are to be read."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    alora_invocation_tokens: list[int] | None = None
    arrow_config: dict[str, Any] | None = None

    def refused(self) -> str:
        """What of it is not known here; "" if nothing."""
        found = {
            f"peft_type {self.peft_type}": self.peft_type != "LORA",
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            f"bias {self.bias}": self.bias != "none",
            "modules_to_save": bool(self.modules_to_save),
            "alpha_pattern": bool(self.alpha_pattern),
            "alora_invocation_tokens": self.alora_invocation_tokens is not None,
            "arrow_config": self.arrow_config is not None,
            f"init_lora_weights {self.init_lora_weights}": isinstance(self.init_lora_weights, str)
            and self.init_lora_weights not in _DRAWN,
        }
        return ", ".join(name for name, is_set in found.items() if is_set)

    def scale(self, rank: int) -> float:
        """Of a matrix's own rank (Kalajdzievski, "rsLoRA", 2023, for the root)."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).is_file()


def find_adapter(reference: str, cache_dir: Path) -> Path:
    """The folder of a registered adapter (`stories@2`), of a path, or of `hf:org/name`. Raises
    ModelFileError."""
    registry = Registry(cache_dir / REGISTRY)
    version = registry.find(reference)
    if version is not None:
        path = registry.path(version)
    elif reference.startswith("hf:"):
        path = fetch_snapshot(reference.removeprefix("hf:"), (ADAPTER, TENSORS))
    else:
        path = Path(reference).expanduser()
    if not is_adapter(path):
        raise ModelFileError(f"no adapter {reference[:200]!r}: no folder with {ADAPTER}")
    return path


def read_facts(folder: Path) -> AdapterFacts:
    """Raises ModelFileError, also for what is not known here."""
    path = folder / ADAPTER
    try:
        facts = msgspec.json.decode(path.read_bytes(), type=AdapterFacts, strict=False)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelFileError(f"{path}: cannot read: {error}") from error
    if refused := facts.refused():
        raise ModelFileError(f"{path}: {refused} is not supported")
    if facts.r < 1 or not math.isfinite(facts.lora_alpha):
        raise ModelFileError(f"{path}: r {facts.r} and lora_alpha {facts.lora_alpha}")
    return facts


def stems_of(config: ModelConfig, layer: int, name: str) -> tuple[str, ...]:
    parts = HF_OF_FAMILY[config.family].parts[f"layers.{{i}}.{name}"]
    return tuple(part.replace("{i}", str(layer)) for part in parts)


def known_targets(config: ModelConfig, layer: int) -> Iterator[str]:
    for name in matrices(config):
        yield from (stem.rpartition(".")[2] for stem in stems_of(config, layer, name))


def _targets(of_layers: list[set[str]]) -> list[str]:
    """Endings of names, where all layers have the same; or else whole names."""
    endings = [
        {stem.partition(f".{layer}.")[2] for stem in stems} for layer, stems in enumerate(of_layers)
    ]
    is_alike = all(own == endings[0] for own in endings)
    return sorted(endings[0] if is_alike else set().union(*of_layers))


def check_kept(config: ModelConfig, names: Mapping[str, Any]) -> None:
    """Raises ConfigError where what is trained beside `names` ("layers.0.attn.qkv.weight") is no
    adapter that can be served."""
    known = {f"layers.{i}.{m}.weight" for i in range(config.num_layers) for m in matrices(config)}
    if spare := sorted({*names} - known):
        raise ConfigError(
            f"{spare[0]} cannot have an adapter of its own: lora.targets may match "
            f"{', '.join(f'layers.*.{m}' for m in matrices(config))}; lora.merge = true takes all"
        )


def write_adapter(
    folder: Path,
    config: ModelConfig,
    trained: Mapping[str, Halves],
    alpha: float,
    base: str,
) -> None:
    """`trained` by the decoder's names, unscaled. A fused matrix's first half is written beside
    each of its parts. The folder is there whole or not at all. Raises ConfigError."""
    from safetensors.numpy import save_file

    check_kept(config, trained)
    tensors, rank = {}, 0
    targets: list[set[str]] = [set() for _ in range(config.num_layers)]
    for name, (a, b) in trained.items():
        _, layer, matrix = name.removesuffix(".weight").split(".", 2)
        stems, rank = stems_of(config, int(layer), matrix), len(a)
        outs = matrices(config)[matrix][1]
        parts = np.split(b, np.cumsum(outs)[:-1]) if len(stems) > 1 else [b]
        for stem, part in zip(stems, parts, strict=True):
            targets[int(layer)].add(stem)
            for half, array in (("A", a), ("B", part)):
                stored = np.ascontiguousarray(array, np.float32)
                tensors[f"{PREFIX}{stem}.lora_{half}.weight"] = stored
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(targets),
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as writing:
        made = Path(writing) / folder.name
        made.mkdir()
        save_file(tensors, made / TENSORS, metadata={"format": "pt"})
        (made / ADAPTER).write_text(json.dumps(facts, indent=2))
        os.replace(made, folder)
