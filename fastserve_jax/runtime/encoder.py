"""An encoder on its device: texts in, vectors or labels' logits out, by a few programs.

Texts are padded to the next of a few lengths, and steps to the next of a few numbers of texts, so
that after the start nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.encoder import Encoder, EncoderConfig, State
from fastserve_jax.models.labeller import Labeller

_SHORTEST = 16


class Text(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def segments(self) -> Sequence[int]: ...


class EncoderRunner:
    def __init__(
        self,
        graph: nnx.GraphDef[Encoder] | nnx.GraphDef[Labeller],
        config: EncoderConfig | ModelConfig,
        state: State,
        *,
        max_texts: int,
        step_tokens: int,
    ) -> None:
        self.config, self._state = config, state
        self._lengths = tuple(_doubling(_SHORTEST, config.max_context))
        self._counts = tuple(_doubling(1, max_texts, by=4))
        self._step_tokens = step_tokens

        def run(state: State, tokens: jax.Array, lengths: jax.Array, kinds: jax.Array) -> jax.Array:
            encoder = nnx.merge(graph, state)
            if config.labels:
                return encoder.logits(tokens, lengths, kinds)
            assert isinstance(encoder, Encoder), "a decoder without labels writes text"
            return encoder.vectors(tokens, lengths, kinds)

        self._program = jax.jit(run)

    def shapes(self) -> list[tuple[int, int]]:
        """Of texts and tokens, that a step may have."""
        return [
            (count, length)
            for count in self._counts
            for length in self._lengths
            if count == 1 or count * length <= self._widest(length)
        ]

    def _widest(self, length: int) -> int:
        """Tokens of the largest step that texts of that length make."""
        most = max(1, self._step_tokens // length)
        return length * next((c for c in self._counts if c >= most), self._counts[-1])

    def warm_up(self, report: Callable[[int, int], None]) -> None:
        shapes = self.shapes()
        for done, (count, length) in enumerate(shapes, 1):
            self._run(np.zeros((2, count, length), np.int32), np.ones(count, np.int32))
            report(done, len(shapes))

    def __call__(self, texts: Sequence[Text]) -> list[list[float]]:
        """Of each text a vector, or what is said of each label before it is normed."""
        longest = max(len(text.tokens) for text in texts)
        length = next(size for size in self._lengths if size >= longest)
        count = next(size for size in self._counts if size >= len(texts))
        ids = np.zeros((2, count, length), np.int32)
        lengths = np.ones(count, np.int32)
        for row, text in enumerate(texts):
            lengths[row] = len(text.tokens)
            ids[0, row, : lengths[row]], ids[1, row, : lengths[row]] = text.tokens, text.segments
        made: list[list[float]] = self._run(ids, lengths)[: len(texts)].tolist()
        return made

    def _run(self, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        made = self._program(self._state, jnp.asarray(ids[0]), lengths, jnp.asarray(ids[1]))
        return np.asarray(made)


def _doubling(first: int, last: int, by: int = 2) -> Iterator[int]:
    size = first
    while size < last:
        yield size
        size *= by
    yield last
