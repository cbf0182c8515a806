"""Chips that programs are compiled for without having one: their names and topologies.

    v5e:2x2, v5p:2x2x1, tpu7x:2x2x1 ...   libtpu's topologies
    a100, h100x8, b200x8 ...              so many GPUs of a host

The real compilers come with the extra `aot`. They must be told before jax is imported that there is
nothing here to find, and one process should compile for one chip only: kernels are cached by
content, whatever the chip, and what a GPU's compiler cannot do ends the process. Knows no model.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from .errors import ConfigError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def topology(chip: str) -> Any:
    """jax's description of the devices of `chip`. Raises ConfigError for what there is not, and
    where the compiler is not installed."""
    from jax.experimental import topologies

    kind, _, shape = chip.partition(":")
    if kind in _TPUS and shape:
        _require("libtpu", chip)
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=chip)
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
        target_config=_target(_GPUS[found[1]]),
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
