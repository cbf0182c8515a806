"""What is counted of one model that is served: times, tokens, ends, and its engine's numbers.

Updates are plain additions on the event loop; the engine is asked for its numbers at the scrape.
Knows no engine, no registry and no HTTP.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from fastserve_jax.core.stats import Stats

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
TOKENS = tuple(float(2**i) for i in range(18))

HISTOGRAMS: Mapping[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (SECONDS, "From a request's arrival to its first token."),
    "inter_token_latency_seconds": (SECONDS, "Between two tokens of one request."),
    "request_time_per_output_token_seconds": (SECONDS, "A request's mean time between tokens."),
    "e2e_request_latency_seconds": (SECONDS, "From a request's arrival to its end."),
    "request_queue_time_seconds": (SECONDS, "From a request's arrival to its first step."),
    "request_prefill_time_seconds": (SECONDS, "From a request's first step to its first token."),
    "request_decode_time_seconds": (SECONDS, "From a request's first token to its last."),
    "request_prompt_tokens": (TOKENS, "Prompt tokens of a finished request."),
    "request_generation_tokens": (TOKENS, "Output tokens of a finished request."),
    "iteration_tokens_total": (TOKENS, "Positions run in one step."),
    "device_step_seconds": (SECONDS, "Time of one step."),
}


class StepRecord(Protocol):
    """What the engine says of a committed step."""

    @property
    def tokens(self) -> int: ...
    @property
    def elapsed_s(self) -> float: ...


class Histogram:
    """Counts per bucket. Not for several threads, which is why it is cheap."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum of all values."""
        below, pairs = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            pairs.append(("+Inf" if bound == float("inf") else repr(bound), float(below)))
        return pairs, self._sum


class RequestMeter:
    """Times one engine request. `done` or, failing that, `close` ends it."""

    __slots__ = (
        *("_first", "_last", "_metrics", "_open", "_prompt_tokens", "_queued_s", "_start"),
        "_token_gap",
    )

    def __init__(self, metrics: ModelMetrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._first = self._last = self._queued_s = 0.0
        self._token_gap = metrics.histograms["inter_token_latency_seconds"].observe
        self._open = True

    def start(self, queued_s: float) -> None:
        self._queued_s = queued_s
        self._metrics.histograms["request_queue_time_seconds"].observe(queued_s)

    def token(self) -> None:
        now = time.perf_counter()
        if self._last:
            self._token_gap(now - self._last)
        else:
            self._first = now
            waited_s = now - self._start
            self._metrics.histograms["time_to_first_token_seconds"].observe(waited_s)
            prefill_s = max(waited_s - self._queued_s, 0.0)
            self._metrics.histograms["request_prefill_time_seconds"].observe(prefill_s)
        self._last = now
        self._metrics.generation_tokens += 1

    def done(self, reason: str, output_tokens: int) -> None:
        """`reason` is stop, length, deadline or error."""
        if not self._open:
            return
        self._open = False
        observe = self._metrics.histograms
        observe["e2e_request_latency_seconds"].observe(time.perf_counter() - self._start)
        observe["request_prompt_tokens"].observe(self._prompt_tokens)
        observe["request_generation_tokens"].observe(output_tokens)
        decode_s = self._last - self._first
        observe["request_decode_time_seconds"].observe(decode_s)
        if output_tokens > 1:
            mean_s = decode_s / (output_tokens - 1)
            observe["request_time_per_output_token_seconds"].observe(mean_s)
        self._metrics.finished[reason] += 1
        self._metrics.prompt_tokens += self._prompt_tokens

    def close(self) -> None:
        """Left before its end: the client went away or a sibling failed."""
        if self._open:
            self._open = False
            self._metrics.finished["abort"] += 1


class Sample(NamedTuple):
    """One value. Names that end in _total are counters, unless `gauge` says otherwise."""

    name: str
    text: str
    value: float
    labels: Mapping[str, str] = {}
    gauge: bool = False


class ModelMetrics:
    """Of the model that clients call `model_name`, whichever version that is."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._stats: Callable[[], Stats] | None = None
        self._page_size = 0
        self._numbers: Callable[[], Mapping[str, float]] = dict

    def request(self, prompt_tokens: int) -> RequestMeter:
        return RequestMeter(self, prompt_tokens)

    def step(self, record: StepRecord) -> None:
        """For the engine's on_step."""
        self.histograms["iteration_tokens_total"].observe(record.tokens)
        self.histograms["device_step_seconds"].observe(record.elapsed_s)

    @contextmanager
    def watching(self, stats: Callable[[], Stats], page_size: int) -> Iterator[None]:
        """Ask `stats` at every scrape, until another engine takes its place. `page_size` in
        tokens."""
        self._stats = stats
        self._page_size = page_size
        try:
            yield
        finally:
            if self._stats is stats:
                self._stats = None

    def observe(self, numbers: Callable[[], Mapping[str, float]]) -> None:
        """Export what it gives at every scrape, in place of what was observed before."""
        self._numbers = numbers

    def samples(self) -> Iterator[Sample]:
        yield Sample("prompt_tokens_total", "Prompt tokens processed.", self.prompt_tokens)
        yield Sample("generation_tokens_total", "Tokens produced.", self.generation_tokens)
        for reason, count in self.finished.items():
            labels = {"finished_reason": reason}
            yield Sample("request_success_total", "", count, labels)
        if self._stats is not None:
            yield from self._engine(self._stats())
        for name, value in self._numbers().items():
            yield Sample(name, name.replace("_", " "), value)

    def _engine(self, stats: Stats) -> Iterator[Sample]:
        used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that own a slot.", stats.running),
            ("num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", used),
            ("num_preemptions_total", "Sequences put back in the queue.", stats.preemptions),
            ("prefix_cache_queries_total", "Prompt tokens looked up.", stats.prefix_query_tokens),
            ("prefix_cache_hits_total", "Prompt tokens found.", stats.prefix_hit_tokens),
            ("computed_tokens_total", "Positions run, repeats included.", stats.computed_tokens),
            ("spec_decode_num_draft_tokens_total", "Tokens guessed.", stats.guessed_tokens),
            ("spec_decode_num_accepted_tokens_total", "Guessed right.", stats.accepted_tokens),
            ("draft_model_tokens_total", "Proposed by it.", stats.proposed_tokens),
            ("draft_model_seconds_total", "In which it did.", stats.asked_s),
            ("engine_steps_total", "Steps committed.", stats.steps),
            ("engine_busy_seconds_total", "Time in steps.", stats.busy_s),
            *_swapping(stats),
        ):
            yield Sample(name, text, value)
        for name, value in stats.policy.items():
            yield Sample(name, f"{name.replace('_', ' ').capitalize()}.", value)
        text = "Live requests by the policy's level, the first going first."
        for level, count in enumerate(stats.levels or ()):
            yield Sample("queue_level_requests", text, count, {"level": str(level)}, gauge=True)
        size = {"block_size": str(self._page_size), "num_gpu_blocks": str(stats.pages_total)}
        yield Sample("cache_config_info", "Size of the KV cache.", 1, size, gauge=True)


def _swapping(stats: Stats) -> tuple[tuple[str, str, float], ...]:
    """What moves between device and host memory, and what it saves and costs."""
    host = stats.host_pages_used / stats.host_pages_total if stats.host_pages_total else 0.0
    size = stats.page_bytes
    return (
        ("host_cache_usage_perc", "Share of host KV pages in use, 0 to 1.", host),
        ("host_cache_hits_total", "Tokens found in host memory.", stats.host_hit_tokens),
        ("swap_out_pages_total", "Pages copied to host memory.", stats.pages_out),
        ("swap_in_pages_total", "Pages copied back.", stats.pages_in),
        ("swap_out_bytes_total", "Bytes copied to host memory.", stats.pages_out * size),
        ("swap_in_bytes_total", "Bytes copied back.", stats.pages_in * size),
        ("swap_stall_seconds_total", "Time that copies added to steps.", stats.stall_s),
        ("recomputed_tokens_total", "Positions a preemption lost.", stats.recomputed_tokens),
        ("step_cost_error", "Mean error of predicted step time, moving.", stats.cost_error),
    )
