"""POST /v1/embeddings, /classify and /score: texts through an encoder, all of a request or none."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence

from aiohttp import web

from fastserve_jax.api.embeddings import (
    Class,
    ClassifyAnswer,
    ClassifyRequest,
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    Input,
    Score,
    ScoreAnswer,
    ScoreRequest,
    encoded,
    inputs,
)
from fastserve_jax.api.sampling import check_ids
from fastserve_jax.api.usage import usage
from fastserve_jax.encoding import Numbers, Text
from fastserve_jax.errors import InvalidRequest
from fastserve_jax.server.exchange import STATE, json_answer, read_json
from fastserve_jax.server.served import ServedEncoder

MOST_TEXTS = 2048  # in one request, as OpenAI has it


async def embed(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, EmbeddingRequest)
    asked.check()
    served = request.app[STATE].encoder(asked.model)
    if served.labels:
        raise InvalidRequest(f"{served.name} is a classifier: ask /classify", param="model")
    size = asked.dimensions or served.size
    if size > served.size:
        raise InvalidRequest(f"{served.name} has {served.size} dimensions", param="dimensions")
    texts = _texts(served, inputs(asked.input, MOST_TEXTS))
    vectors = await served.encodings.numbers(texts)
    as_base64 = asked.encoding_format == "base64"
    shown = [_shortened(vector, size) for vector in vectors]
    data = [Embedding(i, encoded(vector, as_base64)) for i, vector in enumerate(shown)]
    return json_answer(EmbeddingAnswer(data, served.name, usage(_count(texts), 0, 0)))


async def classify(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, ClassifyRequest)
    served = request.app[STATE].encoder(asked.model)
    if not served.labels:
        raise InvalidRequest(f"{served.name} was taught no labels", param="model")
    texts = _texts(served, inputs(asked.input, MOST_TEXTS))
    logits = await served.encodings.numbers(texts)
    data = []
    for index, row in enumerate(logits):
        shares = _shares(row)
        best = max(range(len(shares)), key=shares.__getitem__)
        data.append(Class(index, served.labels[best], shares, len(shares)))
    return json_answer(
        ClassifyAnswer(_id("classify"), _now(), served.name, data, usage(_count(texts), 0, 0))
    )


async def score(request: web.Request) -> web.StreamResponse:
    """Of two texts how much alike they are: the cosine of their vectors."""
    asked = await read_json(request, ScoreRequest)
    served = request.app[STATE].encoder(asked.model)
    if served.labels:
        raise InvalidRequest(f"{served.name} is a classifier: ask /classify", param="model")
    pairs = asked.pairs()
    if len(pairs) > MOST_TEXTS:
        raise InvalidRequest(f"at most {MOST_TEXTS} pairs in one request", param="text_1")
    told = list(dict.fromkeys(text for pair in pairs for text in pair))
    texts = _texts(served, told)
    vectors = dict(zip(told, await served.encodings.numbers(texts), strict=True))
    data = [Score(i, _cosine(vectors[a], vectors[b])) for i, (a, b) in enumerate(pairs)]
    return json_answer(
        ScoreAnswer(_id("score"), _now(), served.name, data, usage(_count(texts), 0, 0))
    )


def _texts(served: ServedEncoder, given: Sequence[Input]) -> list[Text]:
    """Raises InvalidRequest for one that is longer than the encoder reads."""
    texts = []
    for index, one in enumerate(given):
        if isinstance(one, str):
            tokens, segments = served.words.encode_pair(one)
        else:
            check_ids(one, served.words.vocab_size, "input")
            tokens, segments = one, [0] * len(one)
        if len(tokens) > served.context:
            raise InvalidRequest(
                f"input {index} has {len(tokens)} tokens, more than the context of "
                f"{served.context}: shorten it, or send it in parts",
                param="input",
                code="context_length_exceeded",
            )
        texts.append(Text(tokens, segments))
    return texts


def _count(texts: Sequence[Text]) -> int:
    return sum(len(text.tokens) for text in texts)


def _shortened(vector: Numbers, size: int) -> Numbers:
    """Its first numbers, of length one again where it was."""
    if size == len(vector):
        return vector
    whole, part = math.hypot(*vector), math.hypot(*vector[:size])
    return [number * whole / part if part else number for number in vector[:size]]


def _cosine(one: Numbers, other: Numbers) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(float.__mul__, one, other)) / lengths if lengths else 0.0


def _shares(logits: Numbers) -> list[float]:
    most = max(logits)
    raised = [math.exp(logit - most) for logit in logits]
    total = sum(raised)
    return [each / total for each in raised]


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:24]}"


def _now() -> int:
    return int(time.time())
