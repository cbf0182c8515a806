"""What a person sees of `evaluate`, and what is kept of it beside the version that was measured.

The measures themselves are in evaluate.py (arrays), answers.py and harness.py (a running server).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastserve_jax.api.models import ModelCard
from fastserve_jax.client import AsyncClient
from fastserve_jax.errors import ConfigError
from fastserve_jax.terminal import console
from fastserve_jax.text.load import load_words
from fastserve_jax.weights.registry import REGISTRY, Registry

from .answers import Answered, ask, compare, read_questions, served
from .dataset import TOKENIZER, Dataset
from .evaluate import Found, evaluate, passage_of, text_of
from .harness import Harness, run_harness

_SHOWN = 160  # characters of a text


class Subject:
    """What is measured: found once, so that a name that comes to mean another version meanwhile
    changes nothing."""

    def __init__(self, reference: str, cache_dir: Path) -> None:
        self._registry = Registry(cache_dir / REGISTRY)
        self._version = self._registry.find(reference)
        self.name = str(self._version or reference)  # as a server calls it

    def keep(self, measured: Mapping[str, object]) -> None:
        """Beside a version; of any other model nothing."""
        if self._version is not None:
            self._registry.note(self._version, measured)


def run_evaluate(reference: str, folder: Path, part: str, as_json: bool, cache_dir: Path) -> None:
    import jax.numpy as jnp

    from .origin import open_arrays

    data, subject = Dataset(folder), Subject(reference, cache_dir)
    model, arrays, vocab_size = open_arrays(subject.name, cache_dir, jnp.float32)
    if vocab_size != data.facts.vocab_size:
        raise ConfigError(f"{folder} was prepared with another vocabulary than {reference}'s")
    with _bar("measuring") as bar:
        task = bar.add_task("", total=None)
        found = evaluate(
            model, arrays, data, part, lambda n, of: bar.update(task, completed=n, total=of)
        )
    subject.keep({"data": data.facts.fingerprint, "part": part, **found.metrics})
    _show(found.metrics, found, as_json, _errors(found, data, part), found.report)


def run_answers(
    reference: str,
    path: Path,
    url: str,
    api_key: str | None,
    max_tokens: int,
    as_json: bool,
    cache_dir: Path,
) -> None:
    """Of the server at `url`, which must be serving that very model."""
    questions, mark = read_questions(path)
    subject = Subject(reference, cache_dir)

    async def answers() -> list[str]:
        async with AsyncClient(url, api_key) as client:
            card = await served(client, subject.name)
            with _bar("asking") as bar:
                task = bar.add_task("", total=len(questions))
                found = await ask(
                    *(client, card.id, questions, max_tokens),
                    lambda done, _: bar.update(task, completed=done),
                )
            await _still(client, subject.name, card)
            return found

    found = compare(questions, asyncio.run(answers()))
    subject.keep({"data": mark, "max_tokens": max_tokens, **found.metrics})
    _show(found.metrics, found, as_json, _answers(found))


def run_tasks(
    reference: str, asked: Harness, url: str, api_key: str | None, as_json: bool, cache_dir: Path
) -> None:
    subject = Subject(reference, cache_dir)

    async def there(before: ModelCard | None = None) -> ModelCard:
        async with AsyncClient(url, api_key) as client:
            if before is not None:
                await _still(client, subject.name, before)
            return await served(client, subject.name)

    card = asyncio.run(there())
    with console.status("lm-eval is asking"):
        metrics = run_harness(asked, url, card, api_key)
    asyncio.run(there(card))
    settings = {"tasks": asked.tasks, "limit": asked.limit, "chat": asked.is_chat}
    subject.keep({**settings, **metrics})
    _show(metrics, {"metrics": metrics}, as_json)


async def _still(client: AsyncClient, model: str, card: ModelCard) -> None:
    """Raises ConfigError where another took its name meanwhile, and may have answered."""
    if await served(client, model) != card:
        raise ConfigError(f"{card.id} was loaded anew while it was measured: measure it once more")


def _show(
    metrics: Mapping[str, float],
    found: Found | Answered | Mapping[str, Any],
    as_json: bool,
    errors: Iterable[str] = (),
    report: str = "",
) -> None:
    if as_json:
        print(msgspec.json.encode(found).decode())
        return
    out = Console()
    if report:
        out.print(report, highlight=False, markup=False, soft_wrap=True)
    width = max(map(len, metrics), default=0) + 2
    for name, value in metrics.items():
        out.print(f"{name:{width}}{value:10.4f}", highlight=False, markup=False, soft_wrap=True)
    for said in errors:
        out.print(said, highlight=False, markup=False)


def _errors(found: Found, data: Dataset, part: str) -> Iterator[str]:
    if not (found.errors or found.passages):
        return
    words = load_words(data.folder / TOKENIZER)
    for error in found.errors:
        said = words(text_of(data, part, error.row))[:_SHOWN]
        yield f"{error.share:.0%} {error.given}, not {error.label}: {said}"
    for passage in found.passages:
        before, behind = passage_of(data, part, passage)
        least, rest = repr(words(behind[:1])), words(behind[1:])
        shown = f"{words(before)[-_SHOWN:]} >{least}< {rest[: _SHOWN // 2]}"
        yield (
            f"{passage.loss:.2f} nats/token, {passage.nats:.1f} at {least}: "
            f"{' '.join(shown.split())}"
        )


def _answers(found: Answered) -> Iterator[str]:
    for one in found.errors:
        texts = (one.question, one.answer, one.reference)
        asked, said, wanted = (" ".join(text.split())[:_SHOWN] for text in texts)
        yield f"rougeL {one.rouge_l:.2f}: {asked}\n  said   {said}\n  wanted {wanted}"


def _bar(what: str) -> Progress:
    return Progress(TextColumn(what), BarColumn(), console=console, transient=True)
