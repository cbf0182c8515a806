"""Devices to simulate: two written down here, any other from a file that a measurement wrote.

Knows cost models and their JSON; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from ..core.cost import CostModel
from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Preset:
    step_s: float  # whatever is in it
    prefill_token_s: float
    decode_row_s: float
    kv_token_bytes: float  # keys and values of one token, all layers
    memory_bps: float  # at which they are read
    copy_bps: float  # between device and host memory, beside the compute


# Planning figures, not measurements: write_device keeps those.
_PRESETS: Mapping[str, _Preset] = {
    # OPT-13B in 16 bits on an A100-40GB, round figures: 26 GB of weights at 1.5 TB/s make 18 ms;
    # 26 GFLOP a token at half of 312 TFLOP/s make 0.17 ms. Keys and values: 40 layers x 2 x 5120
    # x 2 bytes = 0.82 MB a token. PCIe 4 x16 moves 20 GB/s.
    "a100-opt13b": _Preset(18e-3, 0.17e-3, 0.05e-3, 0.82e6, 1.6e12, 20e9),
    # Llama 3 8B in bf16 on an H100 SXM: 16 GB of weights at 3.35 TB/s are a floor of 4.8 ms, 6 ms
    # at the 80% of it that kernels reach; 16 GFLOP a token at half of 989 TFLOP/s make 0.032 ms.
    # A decode row hides its arithmetic behind the weights; 0.01 ms is its sampling and its share
    # of small kernels. 32 layers x 2 x 8 heads x 128 x 2 bytes = 131 KB a token. PCIe 5: 50 GB/s.
    "h100-llama3-8b": _Preset(6e-3, 0.032e-3, 0.01e-3, 131_072, 2.7e12, 50e9),
}
DEVICES = tuple(_PRESETS)


class _About(msgspec.Struct):
    """What a file says besides the model's own numbers."""

    page_size: int = 16  # tokens of a page, as it was measured
    about: str = ""  # where the numbers come from


def read_device(name: str, page_size: int = 16) -> CostModel:
    """A device of ours, or a file that write_device wrote, with pages of `page_size` tokens."""
    if name in _PRESETS:
        return _preset(_PRESETS[name], page_size)
    path = Path(name)
    if not path.exists():
        known = ", ".join(DEVICES)
        raise ConfigError(f"no device {name!r}: there are {known}, or give a JSON file of one")
    try:
        tree = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        about, model = _split(path, tree)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: no description of a device: {error}") from error
    _check(path, model, about)
    return _with_pages(model, page_size / about.page_size)


def write_device(path: Path, model: CostModel, *, page_size: int = 16, about: str = "") -> None:
    """A file that read_device understands; `about` says where the numbers come from."""
    tree = {"about": about, "page_size": page_size, **_numbers(model)}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")


def _numbers(model: CostModel) -> dict[str, Any]:
    return {part.name: getattr(model, part.name) for part in fields(model)}


def _preset(preset: _Preset, page_size: int) -> CostModel:
    page_bytes = preset.kv_token_bytes * page_size
    return CostModel(
        base_s=[preset.step_s],
        buckets=(1,),
        prefill_token_s=preset.prefill_token_s,
        decode_row_s=preset.decode_row_s,
        kv_token_s=preset.kv_token_bytes / preset.memory_bps,
        page_out_s=page_bytes / preset.copy_bps,
        page_in_s=page_bytes / preset.copy_bps,
        overlaps=True,
        page_bytes=round(page_bytes),
    )


def _split(path: Path, tree: dict[str, Any]) -> tuple[_About, CostModel]:
    own = {part.name for part in fields(CostModel)}
    unknown = sorted(tree.keys() - own - {"page_size", "about"})
    if unknown:
        raise ConfigError(
            f"{path}: no number of a device is called {unknown[0]!r}: there are "
            f"{', '.join(sorted(own))}, page_size, about"
        )
    missing = sorted({"base_s", "prefill_token_s", "decode_row_s"} - tree.keys())
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing")
    model = msgspec.convert({name: tree[name] for name in tree.keys() & own}, CostModel)
    return msgspec.convert(tree, _About), model


def _check(path: Path, model: CostModel, about: _About) -> None:
    for name, value in _numbers(model).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if not (math.isfinite(number) and number >= 0):
                raise ConfigError(f"{path}: {name} is {number}: it must be finite and not negative")
    if about.page_size < 1:
        raise ConfigError(f"{path}: page_size must be at least 1")
    sizes = model.buckets
    if not sizes or len(sizes) != len(model.base_s) or list(sizes) != sorted(set(sizes)):
        raise ConfigError(f"{path}: buckets must ascend, and base_s have a time for each of them")
    if min(model.base_s) <= 0:
        raise ConfigError(f"{path}: base_s: every step takes time, 0 is none")


def _with_pages(model: CostModel, factor: float) -> CostModel:
    """Copies take as long as their bytes."""
    model.page_out_s *= factor
    model.page_in_s *= factor
    model.page_bytes = round(model.page_bytes * factor)
    return model
