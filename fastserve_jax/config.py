"""Every setting in one tree, from a TOML file and `a.b=c` overrides. Strict; decides nothing.

Each part's own values keep their meaning in that part; here they are only collected.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from fastserve_jax.core.routing import POLICIES as ROUTERS
from fastserve_jax.errors import ConfigError
from fastserve_jax.server.config import ServerConfig

DTYPES = ("auto", "bf16", "int8", "f32")
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
SPECULATE = ("auto", "off")
MESH_AXES = ("data", "expert", "model")
MOST_CONTEXT = 8192  # without being asked for more: a longer context costs slots


@dataclass(frozen=True, slots=True)
class ModelSettings:
    dtype: str = "auto"  # of weights; auto is int8 where that is measured to do, or bf16
    int8_keep: tuple[str, ...] = ()  # matrices that stay bf16 in int8: "layers.*.mlp.down"
    memory: float = 0.0  # share of an accelerator's that a model may have; 0: all that is free
    draft: str = ""  # a smaller model of the same vocabulary, to guess what this one will say


@dataclass(frozen=True, slots=True)
class KVSettings:
    pages: int = 0  # 0: as many as memory allows
    page_size: int = 16  # tokens
    host_pages: int = -1  # for sequences that wait; -1: as many as memory allows, 0: none


@dataclass(frozen=True, slots=True)
class EngineSettings:
    policy: str = "adaptive"  # who goes first: see core/policy.py
    overlap: bool = True  # plan and dispatch a step while the one before it runs
    speculate: str = "auto"  # guess tokens from a request's own text where that pays; or off
    max_slots: int = 32  # sequences in one step
    step_tokens: int = 128  # tokens in one step, decodes and prompt chunks together
    max_context: int = 0  # prompt and output of one request; 0: the model's, at most 8192
    max_queue: int = 1024  # requests waiting for a slot


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Adapters that are served beside the model, by names of their own."""

    adapters: tuple[str, ...] = ()  # loaded at the start: "NAME=FOLDER", or NAME alone, registered
    max_adapters: int = 0  # at once, loaded while it serves among them; 0: as many as `adapters`
    max_rank: int = 16  # of one

    @property
    def count(self) -> int:
        return self.max_adapters or len(self.adapters)

    def named(self) -> dict[str, str]:
        """References by name. Raises ConfigError where a name is there twice."""
        named = {}
        for text in self.adapters:
            name, equals, reference = text.partition("=")
            if not name or name in named or (equals and not reference):
                raise ConfigError(f"adapter {text!r}: write NAME=REFERENCE, each name once")
            named[name] = reference or name
        return named


@dataclass(frozen=True, slots=True)
class MeshSettings:
    data: int = 0  # replicas; 0: what the devices leave
    expert: int = 0  # groups of a model's experts in each; 0: as many as divide them
    model: int = 0  # parts of each; 0: as many as suit the KV heads
    cpu_devices: int = 0  # into which a CPU is divided; 0: as JAX has it, one


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Of replicas on Ray; what each host of one takes is what its node must have free."""

    replicas: int = 2
    max_replicas: int = 0  # as many while requests queue; 0: never more than `replicas`
    hosts: int = 1  # of one replica
    cpus: float = 1.0  # of each host, as are
    gpus: float = 0.0
    tpus: float = 0.0  # chips
    placement: str = "SPREAD"  # Ray's strategy for the hosts of one replica
    router: str = "prefix"  # see core/routing.py


@dataclass(frozen=True, slots=True)
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    server: ServerConfig = field(default_factory=ServerConfig)
    fleet: FleetSettings = field(default_factory=FleetSettings)


def load_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """The file's settings, then each "a.b=c" over them. Raises ConfigError naming the place."""
    settings = read_settings(Settings, path, overrides)
    _check_values(settings)
    return settings


def read_settings[T](kind: type[T], path: Path | None, overrides: Iterable[str] = ()) -> T:
    """The same of any tree of settings, whose values are not checked yet."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        _check_names(tree, kind, str(path), ())
    for override in overrides:
        names, value = _parse(override)
        nested: dict[str, Any] = {names[-1]: value}
        for name in reversed(names[:-1]):
            nested = {name: nested}
        _check_names(nested, kind, "--set", ())
        _merge(tree, nested)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path or '--set'}: {error}") from error


def asked_axes(mesh: MeshSettings) -> dict[str, int]:
    """By name; 0 where nothing is asked for."""
    return {axis: getattr(mesh, axis) for axis in MESH_AXES}


def parse_mesh(text: str) -> dict[str, int]:
    """ "model=4,data=2". Raises ConfigError."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if not size.isdecimal() or int(size) == 0:
            raise ConfigError(f"--mesh {text}: write it as model=4,data=2")
        if axis.strip() not in MESH_AXES:
            raise ConfigError(f"--mesh {text}: no axis {axis}: there are {', '.join(MESH_AXES)}")
        sizes[axis.strip()] = int(size)
    return sizes


def _parse(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: write it as section.name=value")
    try:
        return names, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return names, text  # a bare word is a string


def _check_names(tree: dict[str, Any], kind: type, where: str, above: tuple[str, ...]) -> None:
    hints = get_type_hints(kind)
    for name, value in tree.items():
        full = ".".join((*above, name))
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {'.'.join((*above, near[0]))}?" if near else ""
            raise ConfigError(
                f"{where}: no setting {full}: {hint or 'there are ' + ', '.join(sorted(hints))}"
            )
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {full} is a section: write {full}.name=value")
            assert isinstance(hints[name], type)
            _check_names(value, hints[name], where, (*above, name))


def _merge(tree: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _check_values(settings: Settings) -> None:
    engine, kv, fleet = settings.engine, settings.kv, settings.fleet
    if settings.model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is one of {', '.join(DTYPES)}, not {settings.model.dtype}")
    if engine.speculate not in SPECULATE:
        choices = ", ".join(SPECULATE)
        raise ConfigError(f"engine.speculate is one of {choices}, not {engine.speculate}")
    if fleet.router not in ROUTERS:
        raise ConfigError(f"fleet.router is one of {', '.join(ROUTERS)}, not {fleet.router}")
    if fleet.placement not in PLACEMENTS:
        choices = ", ".join(PLACEMENTS)
        raise ConfigError(f"fleet.placement is one of {choices}, not {fleet.placement}")
    if not (fleet.cpus or fleet.gpus or fleet.tpus):
        raise ConfigError(
            "fleet.cpus, gpus and tpus are all 0: a host of a replica takes something"
        )
    if not 0 <= settings.model.memory <= 1:
        raise ConfigError(f"model.memory is {settings.model.memory}, a share is from 0 to 1")
    if settings.model.draft and engine.speculate == "off":
        raise ConfigError("model.draft is for guessing: engine.speculate is off")
    if len(settings.lora.named()) > settings.lora.count:
        raise ConfigError(f"lora.max_adapters is {settings.lora.count}, and there are more")
    lowest = {
        "lora.max_adapters": (settings.lora.max_adapters, 0),
        "lora.max_rank": (settings.lora.max_rank, 1),
        "mesh.data": (settings.mesh.data, 0),
        "mesh.expert": (settings.mesh.expert, 0),
        "mesh.model": (settings.mesh.model, 0),
        "mesh.cpu_devices": (settings.mesh.cpu_devices, 0),
        "kv.pages": (kv.pages, 0),
        "kv.page_size": (kv.page_size, 1),
        "kv.host_pages": (kv.host_pages, -1),
        "engine.max_slots": (engine.max_slots, 1),
        "engine.step_tokens": (engine.step_tokens, engine.max_slots),
        "engine.max_context": (engine.max_context, 0),
        "engine.max_queue": (engine.max_queue, 1),
        "fleet.replicas": (fleet.replicas, 1),
        "fleet.max_replicas": (fleet.max_replicas or fleet.replicas, fleet.replicas),
        "fleet.hosts": (fleet.hosts, 1),
        "fleet.cpus": (fleet.cpus, 0),
        "fleet.gpus": (fleet.gpus, 0),
        "fleet.tpus": (fleet.tpus, 0),
        "server.port": (settings.server.port, 0),
        "server.max_body_bytes": (settings.server.max_body_bytes, 1),
    }
    for name, (value, least) in lowest.items():
        if value < least:
            raise ConfigError(f"{name} is {value}, it must be at least {least}")
    if settings.server.port > 65535:
        raise ConfigError(f"server.port is {settings.server.port}, the highest is 65535")
