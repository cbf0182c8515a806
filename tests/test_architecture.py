"""The house rules that a machine can check: floors, sizes, first lines, forbidden things."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastserve_jax"
FLOORS = {
    "errors": 0,
    "chips": 1,
    "core": 1,
    "models": 2,
    "runtime": 2,
    "runtime.runner": 3,
    "runtime.calibrate": 4,
    "text": 3,
    "weights": 3,
    "meters": 2,
    "metrics": 3,
    "api": 3,
    "simulation": 3,
    "adapters": 4,
    "engine": 4,
    "encoding": 4,
    "client": 4,
    "server": 5,
    "draft_model": 5,
    "reading": 5,
    "group": 4,
    "fitting": 6,
    "planning": 7,
    "lifecycle": 7,
    "config": 6,
    "terminal": 6,
    "assemble": 6,
    "doctor": 6,
    "follow": 7,
    "serve": 9,
    "hosting_encoder": 7,
    "hosting": 8,
    "roster": 8,
    "fleet": 10,
    "local": 7,
    "cli": 11,
}
# Which part of a room another one on its floor may use, and why.
ALLOWED = {
    ("runtime", "models"): "the step runs the decoder",
    ("assemble", "config"): "it is given the settings",
    ("fitting", "config"): "it is given the settings",
    ("assemble", "fitting"): "what is fitted is made",
}
FILES = sorted(
    path
    for folder in (PACKAGE, ROOT / "pallas_kernels")
    for path in folder.rglob("*.py")
    if "configs" not in path.parts
)


def room(module):
    """ "runtime.runner" and "runtime" are rooms of their own; otherwise the first name decides."""
    parts = module.split(".")
    return next((r for r in (".".join(parts[:2]), parts[0]) if r in FLOORS), None)


def imports(path):
    """Modules of the package that `path` imports when it is loaded or run, TYPE_CHECKING apart."""
    module = path.relative_to(PACKAGE).with_suffix("")
    here = ("fastserve_jax", *module.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: -node.level]) if node.level else []
            names = [*base, *((node.module or "").split(".") if node.module else [])]
            yield ".".join(names)
            yield from (".".join([*names, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    if PACKAGE not in path.parents:
        known = {"__future__", "collections", "dataclasses", "functools", "jax", "math", "numpy"}
        known |= {"typing"}
        if path.name == "target.py":  # what is traced meanwhile
            known |= {"contextlib", "contextvars"}
        if path.name == "library.py":  # where the compiled kernels are found
            known |= {"ctypes", "importlib", "pathlib"}
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if not (isinstance(node, ast.ImportFrom) and node.level):
                assert {name.split(".")[0] for name in names} <= known
        return
    own = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if own is None:
        assert path.name in ("__init__.py", "__main__.py"), f"{path.name} has no floor"
        return
    for name in imports(path):
        if not name.startswith("fastserve_jax."):
            continue
        other = room(name.removeprefix("fastserve_jax."))
        if other is None or other.split(".")[0] == own.split(".")[0]:
            continue
        is_below = FLOORS[other] < FLOORS[own]
        assert is_below or (own, other) in ALLOWED, f"{own} ({FLOORS[own]}) imports {name}"


def test_core_is_pure():
    allowed = {"__future__", "fastserve_jax", "array", "bisect", "collections", "dataclasses"}
    allowed |= {
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "math",
        "operator",
        "struct",
        "typing",
    }
    for path in (PACKAGE / "core").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_the_engine_never_sees_the_device():
    assert not {n for n in imports(PACKAGE / "engine.py") if n.split(".")[0] in ("jax", "numpy")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_say_what_they_are_for(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert len(text.splitlines()) < 10 or ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 70, f"{node.name} is longer than a screen"
    assert not re.search(r"\b(utils|common|manager|helpers|base)\.py$", path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path):
    text = path.read_text()
    assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill|torch)\b", text, re.M)
    assert not re.search(r"\b(eval|exec)\(", text)
    assert "shell=True" not in text
    assert not re.search(r"https?://[^\s\"']*(/simple\b|/packages/)", text)


def test_top_level_is_as_agreed():
    allowed = {"pyproject.toml", "README.md", "Makefile", "fastserve_jax", "pallas_kernels"}
    allowed |= {"configs", "tests", "bench", "build"}
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in here if not name.endswith(".egg-info")} <= allowed
