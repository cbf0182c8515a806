"""What a step takes, from what is in it: one model for policies, admission and simulation.

    step_s = base_s(bucket of tokens) + prefill_token_s * prefill_tokens
             + decode_row_s * decode_rows + kv_token_s * kv_tokens + stall_s(pages moved)

Fitted to measured steps by least squares, then corrected by every step that runs. Knows numbers
only: what was measured, and how, is the runtime's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

QUERY_BLOCK = 64  # a chunk reads its keys once for so many of its tokens
_GAIN = 0.05  # of a correction: a step weighs as much as the twenty before it
_MOST_SURPRISE = 0.5  # a step that took longer than that much more says nothing of the model
_MOST_SURPRISED = 0.3  # with such a share of surprises the device has become another
_RIDGE = 1e-6
_PASSES = 3


class StepLoad(NamedTuple):
    """What one step is made of."""

    prefill_tokens: int = 0  # positions run in chunks of more than one
    decode_rows: int = 0  # sequences that run one token
    kv_tokens: int = 0  # keys read: a row's length, a chunk's length once per QUERY_BLOCK
    pages_out: int = 0  # copied from the device to host memory
    pages_in: int = 0

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_rows

    @property
    def pages_moved(self) -> int:
        return self.pages_out + self.pages_in


@dataclass(slots=True)
class CostModel:
    """All in seconds. `buckets` are the token counts a step is padded to, ascending; one bucket
    where nothing is padded. `page_bytes` is for reports."""

    base_s: list[float] = field(default_factory=lambda: [0.001])
    buckets: tuple[int, ...] = (1,)
    prefill_token_s: float = 1e-4
    decode_row_s: float = 1e-4
    kv_token_s: float = 0.0
    page_out_s: float = 0.0
    page_in_s: float = 0.0
    overlaps: bool = False  # copies run beside the step's compute, and cost what exceeds it
    page_bytes: int = 0
    error: float = 0.0  # moving average of |measured / predicted - 1|
    surprises: int = 0  # steps too far off to learn from
    surprised: float = 0.0  # moving average of how many were

    def compute_s(self, load: StepLoad) -> float:
        return (
            self.base_s[self._bucket(load.tokens)]
            + self.prefill_token_s * load.prefill_tokens
            + self.decode_row_s * load.decode_rows
            + self.kv_token_s * load.kv_tokens
        )

    def move_s(self, pages_out: int, pages_in: int) -> float:
        """What the copies take by themselves."""
        return self.page_out_s * pages_out + self.page_in_s * pages_in

    def stall_s(self, load: StepLoad) -> float:
        """By how much copies lengthen the step."""
        if not load.pages_out and not load.pages_in:
            return 0.0
        move_s = self.move_s(load.pages_out, load.pages_in)
        return max(0.0, move_s - self.compute_s(load)) if self.overlaps else move_s

    def step_s(self, load: StepLoad) -> float:
        return self.compute_s(load) + self.stall_s(load)

    def prefill_s(self, tokens: int, chunk: int, kv_tokens: int = 0) -> float:
        """What `tokens` of a prompt take alone in chunks of `chunk`, behind `kv_tokens` known."""
        whole, rest = divmod(max(tokens, 0), chunk)
        one_s = self.base_s[self._bucket(chunk)] + self.prefill_token_s * chunk
        total_s = whole * one_s
        if rest:
            total_s += self.base_s[self._bucket(rest)] + self.prefill_token_s * rest
        reads = (kv_tokens + tokens / 2) * (tokens / QUERY_BLOCK)
        return total_s + self.kv_token_s * reads

    def token_s(self, chunk: int) -> float:
        """What a prompt's token costs in a step of `chunk`: its share of the base, and its own."""
        return self.base_s[self._bucket(chunk)] / chunk + self.prefill_token_s

    def _bucket(self, tokens: int) -> int:
        return min(bisect_left(self.buckets, tokens), len(self.buckets) - 1)

    # Learning

    def observe(self, load: StepLoad, elapsed_s: float) -> None:
        """Correct every term in proportion to its share of what was predicted."""
        predicted_s = self.step_s(load)
        if not load.tokens or predicted_s <= 0.0:
            return
        miss = elapsed_s / predicted_s - 1.0
        is_surprise = miss > _MOST_SURPRISE
        self.surprised += _GAIN * (is_surprise - self.surprised)
        if is_surprise:
            self.surprises += 1
            if self.surprised < _MOST_SURPRISED:
                return  # a pause of the machine, or an engine that had been idle
            miss = _MOST_SURPRISE
        self.error += _GAIN * (abs(miss) - self.error)
        step = _GAIN * miss / predicted_s
        at = self._bucket(load.tokens)
        self.base_s[at] *= 1.0 + step * self.base_s[at]
        self.prefill_token_s *= 1.0 + step * self.prefill_token_s * load.prefill_tokens
        self.decode_row_s *= 1.0 + step * self.decode_row_s * load.decode_rows
        self.kv_token_s *= 1.0 + step * self.kv_token_s * load.kv_tokens

    def copy(self) -> CostModel:
        return replace(self, base_s=list(self.base_s))


def fit(
    samples: Iterable[tuple[StepLoad, float]],
    buckets: Sequence[int],
    *,
    overlaps: bool = False,
    page_bytes: int = 0,
) -> CostModel:
    """The model that explains `samples` (load, seconds) best; relative errors count alike.

    Relative to what is predicted, in a few passes: relative to what was measured, slow steps would
    count less than quick ones, and all would come out too low. Terms that come out negative are
    nothing, and the others are fitted again without them. Copies are not fitted where they
    overlap: time them alone and set `page_out_s`, `page_in_s`.
    """
    sizes = tuple(buckets)
    model = CostModel(base_s=[0.0] * len(sizes), buckets=sizes)
    rows: list[tuple[list[float], float]] = []
    for load, seconds in samples:
        one_hot = [0.0] * len(sizes)
        one_hot[model._bucket(load.tokens)] = 1.0
        moves = [0.0, 0.0] if overlaps else [float(load.pages_out), float(load.pages_in)]
        terms = [*one_hot, *map(float, load[:3]), *moves]
        rows.append((terms, seconds))
    values: list[float] = [0.0] * (len(sizes) + 5)
    scales = [seconds for _, seconds in rows]
    for _ in range(_PASSES if rows else 0):
        values = _nonnegative(rows, scales)
        found = [sum(v * t for v, t in zip(values, terms, strict=True)) for terms, _ in rows]
        scales = [max(predicted, 0.1 * s) for predicted, (_, s) in zip(found, rows, strict=True)]
    base_s = values[: len(sizes)]
    known = [value for value in base_s if value > 0]
    for i, value in enumerate(base_s):  # a bucket nobody measured costs what its neighbour does
        if value == 0:
            above = [later for later in base_s[i:] if later > 0]
            base_s[i] = above[0] if above else (known[-1] if known else 1e-6)
    prefill_token_s, decode_row_s, kv_token_s, out_s, in_s = values[len(sizes) :]
    return CostModel(
        base_s, sizes, prefill_token_s, decode_row_s, kv_token_s, out_s, in_s, overlaps, page_bytes
    )


def _nonnegative(rows: list[tuple[list[float], float]], scales: list[float]) -> list[float]:
    """A value for each term, the errors of each row counted in units of its scale."""
    count = len(rows[0][0]) if rows else 0
    used = [i for i in range(count) if any(terms[i] for terms, _ in rows)]
    while True:
        scaled = [
            ([terms[i] / scale for i in used], seconds / scale)
            for (terms, seconds), scale in zip(rows, scales, strict=True)
        ]
        found = dict(zip(used, _least_squares(scaled), strict=True))
        if all(value >= 0 for value in found.values()):
            return [found.get(i, 0.0) for i in range(count)]
        used = [i for i, value in found.items() if value >= 0]


def _least_squares(rows: list[tuple[list[float], float]]) -> list[float]:
    """x of least |A x - b|, by the normal equations; columns are scaled, so the ridge is fair."""
    count = len(rows[0][0]) if rows else 0
    scale = [max(max(abs(t[i]) for t, _ in rows), 1e-300) for i in range(count)]
    matrix = [[0.0] * (count + 1) for _ in range(count)]
    for terms, value in rows:
        scaled = [t / s for t, s in zip(terms, scale, strict=True)]
        for i in range(count):
            for j in range(count):
                matrix[i][j] += scaled[i] * scaled[j]
            matrix[i][count] += scaled[i] * value
    for i in range(count):
        matrix[i][i] += _RIDGE * len(rows)
    for i in range(count):  # Gauss-Jordan; the ridge keeps every pivot away from zero
        pivot = max(range(i, count), key=lambda r: abs(matrix[r][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(count):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][count] / matrix[i][i] / scale[i] for i in range(count)]
