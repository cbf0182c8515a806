"""The command line. Few flags, everything else in TOML; errors are one line and exit status 2, or 3
where another host of the group is lost."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from fastserve_jax.errors import FastServeError, GroupLost, OperatorError
from fastserve_jax.group.membership import HostFlags, membership
from fastserve_jax.lifecycle.cli import Set, data, evaluate, models, search, train
from fastserve_jax.lifecycle.compress.cli import app as compress
from fastserve_jax.simulation.options import Study
from fastserve_jax.weights.catalogue import DEFAULT_MODEL, cache_folder

if TYPE_CHECKING:
    from fastserve_jax.config import Settings

_STUDY, _HOSTS = Study(), HostFlags()
_BEGAN = time.perf_counter()  # what a person waits for includes importing

app = App(
    name="fastserve",
    help="Serve language models on CPU, GPU and TPU with JAX.",
    version_flags=["--version"],
)

app.command(data)
app.command(models)
app.command(train)
app.command(search)
app.command(evaluate)
app.command(compress)

Config = Annotated[Path | None, Parameter(help="A TOML file of settings (see configs/serve/).")]
Mesh = Annotated[
    str,
    Parameter(
        help="model=4,data=2: parts that the model is divided into, and replicas of it; expert=8: "
        "groups of its experts. Without it as many parts as suit the model, the rest replicas."
    ),
]
CpuDevices = Annotated[
    int | None, Parameter(help="Devices that a CPU is divided into, on each host.")
]
Dtype = Annotated[
    str | None, Parameter(help="auto, bf16, int8 or f32: of weights; KV pages are bf16, or f32.")
]
Adapters = Annotated[list[str] | None, Parameter(negative=())]


@app.command
def serve(
    *models: str,
    host: str | None = None,
    port: int | None = None,
    api_key: str | None = None,
    dtype: Dtype = None,
    draft_model: str | None = None,
    adapter: Adapters = None,
    policy: str | None = None,
    max_context: int | None = None,
    max_slots: int | None = None,
    mesh: Mesh = "",
    cpu_devices: CpuDevices = None,
    hosts: Annotated[HostFlags, Parameter(name="*")] = _HOSTS,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Serve MODELS over an OpenAI-compatible API; a request that names none means the first.

    A name of our own registry is served as its current version, whichever that comes to be: after
    `fastserve models promote` the new one is loaded beside, and takes over. NAME@VERSION stays what
    it is, and clients call it so.

    Parameters
    ----------
    models
        Catalogue names (see `fastserve models`), .gguf files, Hugging Face folders, hf:org/name,
        or registered versions; NAME=MODEL where clients are to call it NAME.
    host
        Address to listen on; 0.0.0.0 for all.
    port
        Port to listen on; 0 takes a free one.
    api_key
        Clients must send it as a bearer token; also read from FASTSERVE_API_KEY.
    draft_model
        A smaller model with the same vocabulary, which guesses what comes next where that pays.
    adapter
        NAME=REFERENCE: what clients ask for as NAME is the first of MODELS with a LoRA adapter: a
        folder in PEFT's format, a registered adapter or hf:org/name. May be repeated.
    policy
        Who goes first: adaptive, mlfq (FastServe's), fcfs, srpt-predicted, mlfq-naive or
        run-to-completion. `fastserve simulate` compares them.
    max_context
        Tokens of prompt and output that one request may have.
    max_slots
        Requests that run together in one step.
    """
    gc.disable()  # until it is ready: little of what loading makes is garbage
    settings = _settings(
        config,
        set_ or [],
        **{
            "server.host": host,
            "server.port": port,
            "model.dtype": dtype,
            "model.draft": draft_model,
            "lora.adapters": json.dumps(adapter) if adapter else None,
            "engine.policy": policy,
            "engine.max_context": max_context,
            "engine.max_slots": max_slots,
            "mesh.cpu_devices": cpu_devices,
            **_mesh(mesh),
        },
    )
    settings = _with_key(settings, api_key)
    sys.exit(_serve(models or (DEFAULT_MODEL,), settings, hosts))


def _serve(models: tuple[str, ...], settings: Settings, hosts: HostFlags) -> int:
    """As the host of a group that it is."""
    member = membership(os.environ, hosts)
    if not member.leads:
        from fastserve_jax.follow import follow_model
        from fastserve_jax.weights.load import named

        return follow_model(named(models[0])[1], settings, cache_folder(), member)
    from fastserve_jax.serve import serve_models

    status = asyncio.run(serve_models(models, settings, cache_folder(), _BEGAN, member))
    if any(thread.name == "load" for thread in threading.enumerate()):
        os._exit(status)  # or else it would be waited for
    return status


@app.command
def fleet(
    model: str = DEFAULT_MODEL,
    /,
    *,
    replicas: int | None = None,
    max_replicas: int | None = None,
    hosts: int | None = None,
    ray_address: str = "",
    host: str | None = None,
    port: int | None = None,
    api_key: str | None = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Serve MODEL by several replicas on Ray, behind one address (the extra `ray`).

    Parameters
    ----------
    model
        As for `serve`; every node must be able to read it.
    replicas
        Servers, each with the whole model.
    max_replicas
        As many while requests queue.
    hosts
        Hosts of one replica, which serve together as one.
    ray_address
        Of a Ray cluster; auto finds the one that this machine belongs to. Without it Ray starts
        here, with this machine alone.
    host
        Address to listen on; 0.0.0.0 for all.
    port
        Port to listen on.
    api_key
        As for `serve`.
    """
    try:
        from fastserve_jax.fleet.command import run_fleet
    except ModuleNotFoundError as error:
        from fastserve_jax.errors import ConfigError

        raise ConfigError("a fleet needs Ray: pip install 'fastserve-jax[ray]'") from error
    settings = _settings(
        config,
        set_ or [],
        **{
            "fleet.replicas": replicas,
            "fleet.max_replicas": max_replicas,
            "fleet.hosts": hosts,
            "server.host": host,
            "server.port": port,
        },
    )
    settings = _with_key(settings, api_key)
    sys.exit(asyncio.run(run_fleet(model, settings, cache_folder(), ray_address)))


@app.command
def generate(
    prompt: str,
    model: str = DEFAULT_MODEL,
    /,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: Dtype = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Complete PROMPT with MODEL here, without a server, as it is written (no chat template)."""
    from fastserve_jax.local import Local

    settings = _settings(config, [*_LOCAL, *(set_ or [])], **{"model.dtype": dtype})
    with Local(model, settings, cache_folder()) as local:
        local.complete(prompt, max_tokens, temperature, seed)


@app.command
def chat(
    model: str = DEFAULT_MODEL,
    /,
    *,
    max_tokens: int = 512,
    temperature: float = 0.7,
    system: str | None = None,
    dtype: Dtype = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Talk with MODEL in the terminal, without a server. An empty line or Ctrl-D ends it."""
    from fastserve_jax.local import Local

    settings = _settings(config, [*_LOCAL, *(set_ or [])], **{"model.dtype": dtype})
    with Local(model, settings, cache_folder()) as local:
        local.converse(system, max_tokens, temperature)


@app.command
def pull(model: str = DEFAULT_MODEL, /) -> None:
    """Download MODEL into the cache and check it."""
    from fastserve_jax.terminal import Bars
    from fastserve_jax.weights.load import open_model

    with Bars() as bars:
        files = open_model(model, cache_folder(), bars.pull)
        bars.opened(files)
    print(files.path)


@app.command
def doctor() -> None:
    """Say what this machine has, and what stands in the way of serving."""
    from fastserve_jax.doctor import findings

    for line in findings(cache_folder()):
        print(line)


@app.command
def simulate(study: Annotated[Study, Parameter(name="*")] = _STUDY) -> None:
    """Play requests through the scheduler in virtual time and compare policies. No model is loaded.

    Requests come from --trace or from --load; --rho says how many of them, as a share of what FCFS
    can complete.
    """
    from fastserve_jax.simulation.study import run_study

    run_study(study)


@app.command
def plan(
    model: str,
    /,
    *,
    chip: str,
    mesh: Mesh = "",
    context: int | None = None,
    slots: int | None = None,
    dtype: Dtype = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Say whether MODEL would fit on chips that are not here, and how fast it could be there.

    The step that serves is compiled by the chips' own compiler (the extra `aot`).

    Parameters
    ----------
    model
        A name, a folder, hf:org/name, or a config.json: weights are not needed.
    chip
        v4, v5e, v5p, v6e or tpu7x with a topology (v5e:2x2), or a100, h100, h200 or b200 and how
        many (h100x8).
    context
        Tokens of prompt and output that one request may have.
    slots
        Requests that run together in one step, on each replica.
    json
        Print a list with an object for each compiled step.
    """
    from fastserve_jax.planning.command import run_plan

    flags = {
        "model.dtype": dtype,
        "engine.max_context": context,
        "engine.max_slots": slots,
        **_mesh(mesh),
    }
    run_plan(
        model,
        chip,
        lambda file: _settings(config or file, set_ or [], **flags),
        cache_folder(),
        json,
    )


# One or two sequences at a time: fewer programs to compile than a server needs.
_LOCAL = ("engine.max_slots=4", "engine.step_tokens=128")


def _settings(config: Path | None, sets: list[str], **flags: object) -> Settings:
    """Flags over --set over the file."""
    from fastserve_jax.config import load_settings

    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return load_settings(config, [*sets, *given])


def _with_key(settings: Settings, api_key: str | None) -> Settings:
    key = api_key or os.environ.get("FASTSERVE_API_KEY")
    if not key:
        return settings
    return replace(settings, server=replace(settings.server, api_keys=(key,)))


def _mesh(text: str) -> dict[str, int]:
    from fastserve_jax.config import parse_mesh

    return {f"mesh.{axis}": size for axis, size in parse_mesh(text).items()}


def main(run: Callable[[], object] = app) -> None:
    try:
        run()
    except FastServeError as error:
        print(f"fastserve: {error}", file=sys.stderr)
        sys.stderr.flush()
        if isinstance(error, GroupLost):  # jax would wait for the others, and end less clearly
            os._exit(error.exit_status)
        sys.exit(OperatorError.exit_status)
    except KeyboardInterrupt:
        print(f"\nstopped after {time.perf_counter() - _BEGAN:.0f} s", file=sys.stderr)
        sys.exit(130)
