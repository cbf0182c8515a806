"""Chips that programs are compiled for without having one: their names and topologies.

    v5e:2x2, v5p:2x2x1, tpu7x:2x2x1 ...   libtpu's topologies
    v5e:4x4*2 ...                         and so many slices, joined by the data centre's network
    a100, h100x8, b200x8 ...              so many GPUs of a host

The real compilers come with the extra `aot`. They must be told before jax is imported that there is
nothing here to find, and one process should compile for one chip only: kernels are cached by
content, whatever the chip, and what a GPU's compiler cannot do ends the process. Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one chip, as its maker states them; dense, and per second where not said otherwise."""

    memory_bytes: int  # that programs may have
    bandwidth: float  # bytes of its memory
    operations: float  # of a product in bf16
    int8_operations: float
    link: float  # bytes that go one way around a ring of such chips

    def divided(self, count: int) -> Rates:
        """Of each of `count` devices that share a chip; a ring passes through all of them."""
        return Rates(
            self.memory_bytes // count,
            self.bandwidth / count,
            self.operations / count,
            self.int8_operations / count,
            self.link,
        )


GPU_FRACTION = 0.95  # of a GPU's memory that jax takes at its start, the rest being CUDA's
_GiB = 2**30
_TPUS = {
    "v4": Rates(32 * _GiB, 1.228e12, 275e12, 275e12, 90e9),
    "v5e": Rates(int(15.75 * _GiB), 819e9, 197e12, 394e12, 90e9),
    "v5p": Rates(95 * _GiB, 2.765e12, 459e12, 918e12, 180e9),
    "v6e": Rates(int(31.24 * _GiB), 1.64e12, 918e12, 1836e12, 180e9),
    "tpu7x": Rates(192 * _GiB, 7.38e12, 2307e12, 2307e12, 200e9),
}
_GPUS = {
    "a100": Rates(85_100_068_864, 2.039e12, 312e12, 624e12, 300e9),  # memory as XLA has it
    "h100": Rates(84_942_979_072, 3.352e12, 989e12, 1979e12, 450e9),
    "h200": Rates(151_397_597_184, 4.8e12, 989e12, 1979e12, 450e9),
    "b200": Rates(191_514_411_008, 7.672e12, 2250e12, 4500e12, 900e9),
}
_NAMES = {  # as XLA has them, and jax of those that are here
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
    "b200": "NVIDIA B200",
}


@dataclass(frozen=True, slots=True)
class Chips:
    """So many of a kind, joined."""

    kind: str  # "v5e", "h100"
    platform: str  # "tpu" or "gpu"
    devices: Sequence[Any]  # jax's, to be compiled for
    rates: Rates  # of a device
    slices: int = 1

    @property
    def target(self) -> Any:
        """What kernels ask of a chip: a pallas_kernels.Target."""
        from pallas_kernels import Target

        return Target(
            self.platform,
            has_tma=self.platform == "gpu" and self.kind != "a100",
            has_wgmma=self.kind in ("h100", "h200"),
            has_int8=self.kind != "v4",
        )


def chips(name: str) -> Chips:
    """Raises ConfigError for what there is not, and where the compiler is not installed."""
    kind, _, shape = name.partition(":")
    if kind in _TPUS and shape:
        (shape, slices), devices = _slices(shape), topology(name).devices
        count = math.prod(int(size) for size in shape.split("x")) * slices
        return Chips(kind, "tpu", devices, _TPUS[kind].divided(len(devices) // count), slices)
    devices = topology(name).devices
    kind = next(kind for kind in _GPUS if name.startswith(kind))
    return Chips(kind, "gpu", devices, _of_gpu(kind))


def _slices(shape: str) -> tuple[str, int]:
    """ "4x4*2" -> ("4x4", 2)"""
    one, star, count = shape.partition("*")
    if star and not (count.isdecimal() and int(count)):
        raise ConfigError(f"{shape}: write so many slices as {one or '4x4'}*2")
    return one, int(count or 1)


def _of_gpu(kind: str) -> Rates:
    whole = _GPUS[kind]
    return replace(whole, memory_bytes=int(whole.memory_bytes * GPU_FRACTION))


def rates_of(device_kind: str) -> Rates:
    """Of one chip that is here, by jax's name for it. Raises ConfigError where none are known."""
    words = device_kind.replace("-", " ").split()  # a driver may say no more than "NVIDIA H200"
    kind = next(
        (k for k, name in _NAMES.items() if name == device_kind or k.upper() in words), None
    )
    if kind is None:
        raise ConfigError(f"no rates of {device_kind} are known: {', '.join(_NAMES)}")
    return _TPUS[kind] if kind in _TPUS else _of_gpu(kind)


def topology(chip: str) -> Any:
    """jax's description of the devices of `chip`. Raises ConfigError as `chips` does."""
    from jax.experimental import topologies

    kind, _, shape = chip.partition(":")
    if kind in _TPUS and shape:
        _require("libtpu", chip)
        try:
            one, slices = _slices(shape)
            several = {"num_slices": slices} if slices > 1 else {}
            name = f"{kind}:{one}"
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"there is no topology {chip}: {reason}") from error
    found = re.fullmatch(r"([a-z]+\d+)(?:x(\d+))?", chip)
    if found is None or found[1] not in _GPUS:
        raise ConfigError(
            f"no chip {chip!r} is known: give a TPU with its topology ({', '.join(_TPUS)}; "
            f"v5e:2x2) or a GPU and how many ({', '.join(_GPUS)}; h100x8)"
        )
    _require("jax_plugins.xla_cuda12", chip)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{found[2] or 1}",
        target_config=_target(_NAMES[found[1]]),
    )


def _require(module: str, chip: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f"the compiler for {chip} is not installed: pip install 'fastserve-jax[aot]'"
        )


def _target(name: str) -> str:
    """XLA's description of a GPU, as the plugin that compiles for it carries it."""
    plugin = importlib.import_module("jax_plugins.xla_cuda12")
    library = Path(plugin.__file__ or "").parent / "xla_cuda_plugin.so"
    data = library.read_bytes()
    wanted = f'device_description_str: "{name}"'.encode()
    at = data.find(b"gpu_device_info {")
    while at >= 0:
        end = data.index(b"\0", at)
        if wanted in data[at:end]:
            return data[at:end].decode()
        at = data.find(b"gpu_device_info {", end)
    raise ConfigError(f"this jax knows no {name}")
