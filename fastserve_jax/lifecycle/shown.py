"""Models as a person sees them: the catalogue and versions as tables, and one version's story."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from fastserve_jax.errors import ModelFileError
from fastserve_jax.weights.catalogue import embedded_names, read_catalogue
from fastserve_jax.weights.pull import model_file
from fastserve_jax.weights.registry import REGISTRY, Registry, Version


def show_models(cache_dir: Path) -> None:
    console, column = Console(), Column("model", no_wrap=True)
    table = Table(column, "size", "licence", "here", "what it is", box=None, pad_edge=False)
    for model, entry in sorted(read_catalogue().items()):
        here = "yes" if model_file(entry, cache_dir).exists() else "no"
        size = f"{entry.size_bytes / 1e6:,.0f} MB"
        table.add_row(model, size, entry.licence, here, entry.description)
    for model in embedded_names():
        table.add_row(model, "", "Apache-2.0", "yes", "little stories; comes with the package")
    console.print(table)
    registry = Registry(cache_dir / REGISTRY)
    if not registry.names():
        return
    console.print()
    table = Table("version", "", "made", "how", "of", "held out", box=None, pad_edge=False)
    for name in registry.names():
        current = registry.current(name)
        for version in registry.versions(name):
            mark = "current" if version.number == current else ""
            loss = version.metrics.get("valid_loss")
            held_out = "" if loss is None else f"{loss:.3f}"
            how = version.how + (", an adapter" if registry.is_adapter(version) else "")
            parts = (version.made_at, how, version.parent or "nothing", held_out)
            table.add_row(str(version), mark, *parts)
    console.print(table)


def show_version(reference: str, cache_dir: Path) -> None:
    """Raises ModelFileError."""
    registry = Registry(cache_dir / REGISTRY)
    version = registry.find(reference)
    if version is None:
        there = ", ".join(registry.names()) or "none yet"
        raise ModelFileError(f"no model {reference} is registered: there are {there}")
    console = Console()
    console.print(f"[bold]{version}[/] by {version.how}, {version.made_at}", highlight=False)
    console.print(str(registry.path(version)), soft_wrap=True, highlight=False)
    if registry.is_adapter(version):
        command = f"fastserve serve {version.parent} --adapter {version.name}={version}"
        console.print(f"an adapter: {command}", highlight=False, soft_wrap=True)
    console.print("made of " + " < ".join(_ancestors(registry, version)), highlight=False)
    if version.data:
        console.print(f"data {version.data}", highlight=False)
    for name, value in version.metrics.items():
        console.print(f"{name} {value:g}", highlight=False)
    for note in registry.notes(version):
        console.print(_measured(note), highlight=False, markup=False)
    console.print_json(data=dict(version.settings))


def _measured(note: Mapping[str, object]) -> str:
    said = (f"{name} {value:.4g}" for name, value in note.items() if isinstance(value, float))
    what = note.get("tasks") or f"data {note.get('data')}"
    return f"{note['at']} on {what}: {', '.join(said)}"


def _ancestors(registry: Registry, version: Version) -> list[str]:
    """From it back to what is no version of ours."""
    found = [str(version)]
    while version.parent and version.parent not in found:
        found.append(version.parent)
        try:
            parent = registry.find(version.parent)
        except ModelFileError:
            break
        if parent is None:
            break
        version = parent
    return found if len(found) > 1 else [str(version), "nothing"]
