"""How a running server's answers compare with those that were wanted: BLEU, ROUGE, and the worst.

    BLEU     of all answers together (Papineni et al., 2002), as sacrebleu has it, 0 to 100
    ROUGE    of each answer, then their mean: F of one word, of two, and of the longest common
             subsequence (Lin, 2004), by rouge-score without stemming, 0 to 1; it knows words of
             Latin letters and digits alone

Asks as any client does; knows no model and no files but the questions.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from fastserve_jax.api.models import ModelCard
from fastserve_jax.client import AsyncClient
from fastserve_jax.errors import ConfigError, DataError, InvalidRequest

from .documents import Counts, documents

_MOST_EXAMPLES = 10
_SHOWN = 80  # characters of a question that was refused
_AT_ONCE = 32  # questions that are asked together
_ROUGE = ("rouge1", "rouge2", "rougeL")

type Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to an answer, and that answer."""

    messages: tuple[Message, ...]
    reference: str


@dataclass(frozen=True, slots=True)
class Answer:
    question: str  # the last thing that was said
    reference: str
    answer: str
    rouge_l: float


@dataclass(frozen=True, slots=True)
class Answered:
    metrics: Mapping[str, float]
    errors: tuple[Answer, ...] = field(default=())  # the worst first; none that is as wanted


def read_questions(path: Path) -> tuple[list[Question], str]:
    """Of a file as `data prepare` reads it, and the file's fingerprint. Of a conversation what the
    assistant says last is wanted. Raises DataError."""
    found = []
    for document in documents([path], Counts()):
        *asked, last = document.messages or ({},)
        wanted = last.get("content")
        if not asked or last.get("role") != "assistant" or not isinstance(wanted, str):
            raise DataError(
                f"{path}: no answer to compare with: each line needs prompt and completion, "
                "question and answer, or messages of which the last is the assistant's"
            )
        found.append(Question(tuple(asked), wanted))
    if not found:
        raise DataError(f"{path}: no questions")
    with path.open("rb") as file:
        return found, hashlib.file_digest(file, "blake2b").hexdigest()[:16]


async def served(client: AsyncClient, model: str) -> ModelCard:
    """By what name that very model or version is asked, and since when. Raises ConfigError where
    others are served."""
    cards = {str(card.root or card.id): card for card in await client.models()}
    if model not in cards:
        raise ConfigError(f"the server has {', '.join(cards)}, not {model}: start it with that one")
    return cards[model]


async def ask(
    client: AsyncClient,
    model: str,
    questions: Sequence[Question],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Greedy answers in the questions' order. Raises what the server answers instead, and says to
    what."""
    room, done = asyncio.Semaphore(_AT_ONCE), 0

    async def one(number: int, question: Question) -> str:
        nonlocal done
        async with room:
            try:
                said = await client.chat(
                    [dict(message) for message in question.messages],
                    model=model,
                    max_tokens=max_tokens,
                    temperature=0.0,
                    seed=0,
                )
            except InvalidRequest as error:
                asked = str(question.messages[-1].get("content"))[:_SHOWN]
                raise InvalidRequest(f"question {number}, {asked!r}: {error}") from error
        progress(done := done + 1, len(questions))
        content = said.choices[0].message.content
        return content.strip() if isinstance(content, str) else ""

    return await asyncio.gather(*map(one, count(1), questions))


def compare(questions: Sequence[Question], answers: Sequence[str]) -> Answered:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    wanted = [question.reference.strip() for question in questions]
    scorer = RougeScorer(_ROUGE)
    scores = [scorer.score(ref, ans) for ref, ans in zip(wanted, answers, strict=True)]
    same = [ref == ans for ref, ans in zip(wanted, answers, strict=True)]
    metrics = {
        "bleu": float(corpus_bleu(list(answers), [wanted]).score),
        **{name: sum(score[name].fmeasure for score in scores) / len(questions) for name in _ROUGE},
        "exact": sum(same) / len(questions),
        "questions": float(len(questions)),
    }
    told = [
        Answer(str(q.messages[-1].get("content")), ref, ans, score["rougeL"].fmeasure)
        for q, ref, ans, score in zip(questions, wanted, answers, scores, strict=True)
        if ref != ans
    ]
    worst = sorted(told, key=lambda one: one.rouge_l)[:_MOST_EXAMPLES]
    return Answered(metrics, tuple(worst))
