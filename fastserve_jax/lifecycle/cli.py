"""The commands of a model's life: what they are called, and what a person may say to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fastserve_jax.weights.catalogue import cache_folder

Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="A setting, as section.name=value; may be repeated."),
]

data = App(name="data", help="Text to train on.")


@data.command(name="prepare")
def prepare_data(
    *files: Path,
    out: Path,
    vocabulary: str = "",
    tokenizer: str = "",
    context: int = 512,
    holdout: float = 0.01,
    labels: Annotated[bool, Parameter(negative=())] = False,
    near: float = 0.0,
) -> None:
    """Clean FILES, leave out what is there twice, turn it into tokens and pack these into rows.

    Text (documents apart by a blank line or <|endoftext|>), JSON lines or an array, CSV, or a .zip
    of them. What was interrupted goes on where it stood.

    Parameters
    ----------
    out
        The folder to make.
    vocabulary
        What to train: bpe:4096 or sentencepiece:4096.
    tokenizer
        A model, whose vocabulary to take instead.
    context
        Tokens in a row.
    holdout
        Share of the documents that is kept to measure with.
    labels
        Each text has a label (a column label, category, class or intent), which is to be learned.
    near
        Leave out what is as much like a document before it, by the share of runs of five words that
        both have: .8 is usual. 0 leaves out only what is the same.
    """
    from fastserve_jax.lifecycle.commands import run_prepare
    from fastserve_jax.lifecycle.prepare import Wanted

    wanted = Wanted(context, vocabulary, holdout, "labels" if labels else "text", near)
    run_prepare(files, out, wanted, tokenizer, cache_folder())


@data.command(name="stories")
def write_stories(out: Path, /, *, count: int = 20_000, first: int = 0) -> None:
    """Write COUNT little stories, made by rule, to OUT: text to try training on."""
    from fastserve_jax.errors import ConfigError
    from fastserve_jax.lifecycle.documents import END
    from fastserve_jax.lifecycle.stories import stories

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(END.join(stories(count, first)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot write: {error.strerror}") from error


def train(
    *,
    config: Annotated[Path | None, Parameter(help="A TOML file (see configs/train/).")] = None,
    set_: Set = None,
) -> None:
    """Train a model as the file says (see configs/train/), or go on where that was interrupted."""
    from fastserve_jax.config import read_settings
    from fastserve_jax.lifecycle.settings import TrainSettings

    settings = read_settings(TrainSettings, config, set_ or [])
    from fastserve_jax.lifecycle.commands import run_train

    run_train(settings, cache_folder())


def search(
    *,
    config: Annotated[Path | None, Parameter(help="A TOML file (see configs/train/).")] = None,
    set_: Set = None,
) -> None:
    """Train with other numbers again and again, as the file's [search] says, and tell the best."""
    from fastserve_jax.lifecycle.commands import run_search

    run_search(config, set_ or [], cache_folder())


def evaluate(
    model: str,
    data: Path | None = None,
    /,
    *,
    part: str = "valid",
    server: str = "http://127.0.0.1:8000",
    max_tokens: int = 256,
    tasks: str = "",
    tasks_from: Path | None = None,
    limit: int | None = None,
    chat: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure MODEL, and keep what is found beside a registered version.

    DATA is a prepared folder: perplexity of text, or how it does at labels, by the model itself. Or
    it is a file of questions and answers, or --tasks are lm-eval's: then the server is asked, which
    must be serving MODEL (as /v1/models calls it, or a version).

    Parameters
    ----------
    part
        Of a folder: valid (what --holdout kept apart) or train (all of one with --holdout 0).
    server
        Where MODEL is served. FASTSERVE_API_KEY is its key, where it wants one.
    max_tokens
        Of an answer, at the most.
    tasks
        Of lm-eval, by comma.
    tasks_from
        A folder with tasks of your own, as lm-eval's YAML files.
    limit
        Documents of each task.
    chat
        Put tasks as a chat: those whose answers are written, none that weighs given ones.
    json
        Print one object instead of a table.
    """
    import os

    from fastserve_jax.errors import ConfigError
    from fastserve_jax.lifecycle.harness import Harness
    from fastserve_jax.lifecycle.measured import run_answers, run_evaluate, run_tasks

    if (data is None) == (not tasks):
        raise ConfigError("name what to measure with: a prepared folder, a file, or --tasks")
    key, cache = os.environ.get("FASTSERVE_API_KEY"), cache_folder()
    if data is None:
        run_tasks(model, Harness(tasks, tasks_from, limit, chat), server, key, json, cache)
    elif data.is_file():
        run_answers(model, data, server, key, max_tokens, json, cache)
    else:
        run_evaluate(model, data, part, json, cache)


models = App(name="models", help="What can be served: the catalogue, and versions of our own.")


@models.default
@models.command(name="list")
def list_models() -> None:
    """List the catalogue, what of it is here already, and what is registered."""
    from fastserve_jax.lifecycle.shown import show_models

    show_models(cache_folder())


@models.command
def show(model: str, /) -> None:
    """Say what MODEL (NAME or NAME@VERSION) was made of, how, and how good it is."""
    from fastserve_jax.lifecycle.shown import show_version

    show_version(model, cache_folder())


@models.command
def promote(model: str, /) -> None:
    """Let NAME mean MODEL (NAME@VERSION) from now on."""
    from fastserve_jax.weights.registry import REGISTRY, Registry

    version = Registry(cache_folder() / REGISTRY).promote(model)
    print(f"{version.name} is {version}")


@models.command
def rollback(name: str, /) -> None:
    """Let NAME mean the version before its current one."""
    from fastserve_jax.weights.registry import REGISTRY, Registry

    version = Registry(cache_folder() / REGISTRY).rollback(name)
    print(f"{version.name} is {version}")


Url = Annotated[str, Parameter(help="Of the server.")]
Key = Annotated[str | None, Parameter(help="The server's key; also read from FASTSERVE_API_KEY.")]
_URL = "http://127.0.0.1:8000"


@models.command
def load(model: str, /, *, name: str | None = None, url: Url = _URL, api_key: Key = None) -> None:
    """Have a running server load MODEL beside what it serves (it must have server.loading set).

    Parameters
    ----------
    name
        What clients will call it; a model that they call so now finishes what it has, and goes.
        Else it is called as it is written: NAME follows what is promoted, NAME@VERSION stays.
    """
    from fastserve_jax.lifecycle.remote import run_load

    run_load(model, name, url, api_key)


@models.command
def unload(name: str, /, *, url: Url = _URL, api_key: Key = None) -> None:
    """Have a running server let the model go that clients call NAME."""
    from fastserve_jax.lifecycle.remote import run_unload

    run_unload(name, url, api_key)


@models.command
def export(model: str, out: Path, /) -> None:
    """Write MODEL as others read it: to OUT, a .gguf file, a folder as Hugging Face has them, a
    .stablehlo program of jax.export, or an .onnx one."""
    from fastserve_jax.lifecycle.export import run_export

    run_export(model, out, cache_folder())
