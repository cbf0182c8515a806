"""What operators watch, in Prometheus' words. A registry of its own, read when it is scraped.

What is counted of each model is in meters.py; here are the server's own numbers, and how all of it
is shown. Knows no engine and no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fastserve_jax.meters import HISTOGRAMS, SECONDS, Histogram, ModelMetrics, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BY_REASON = (
    ("request_success_total", "Requests ended.", "finished_reason"),
    ("admission_rejections_total", "Requests refused.", "reason"),
)
_SOCKET_LIFE = "websocket_connection_duration_seconds"


class Metrics(Collector):
    """Everything under the prefix `fastserve:` with the label model_name; the server's own numbers
    have that of the model that it began with."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.rejected: Counter[str] = Counter()
        self.sockets_open = 0
        self.sockets_total = 0
        self._socket_life = Histogram(SECONDS)
        self._models: dict[str, ModelMetrics] = {}
        self._sources: list[Callable[[], Mapping[str, float]]] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def of(self, model_name: str) -> ModelMetrics:
        """Those of a model, which begin when they are first asked for."""
        if model_name not in self._models:
            self._models[model_name] = ModelMetrics(model_name)
        return self._models[model_name]

    def observe(self, source: Callable[[], Mapping[str, float]]) -> None:
        """Export what `source` gives at every scrape; names that end in _total are counters."""
        self._sources.append(source)

    @contextmanager
    def socket(self) -> Iterator[None]:
        """One WebSocket connection, while it is open."""
        start = time.perf_counter()
        self.sockets_open += 1
        self.sockets_total += 1
        try:
            yield
        finally:
            self.sockets_open -= 1
            self._socket_life.observe(time.perf_counter() - start)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the sources

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
            name: CounterMetricFamily(f"fastserve:{name}", text, labels=["model_name", label])
            for name, text, label in _BY_REASON  # shown while nothing has been counted, too
        }
        for name, sample in self._samples():
            if sample.name not in families:
                counts = sample.name.endswith("_total") and not sample.gauge
                kind = CounterMetricFamily if counts else GaugeMetricFamily
                labels = ["model_name", *sample.labels]
                families[sample.name] = kind(f"fastserve:{sample.name}", sample.text, labels=labels)
            families[sample.name].add_metric([name, *sample.labels.values()], sample.value)
        yield from families.values()
        for name, (_, text) in HISTOGRAMS.items():
            of_each = {own.model_name: own.histograms[name] for own in self._models.values()}
            yield _histogram(name, text, of_each)
        life = {self.model_name: self._socket_life}
        yield _histogram(_SOCKET_LIFE, "Life of a WebSocket connection.", life)

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        """Each with the model that it is of."""
        for own in self._models.values():
            yield from ((own.model_name, sample) for sample in own.samples())
        for reason, count in self.rejected.items():
            labels = {"reason": reason}
            yield self.model_name, Sample("admission_rejections_total", "", count, labels)
        active, ever = "websocket_connections_active", "websocket_connections_total"
        yield self.model_name, Sample(active, "Now open.", self.sockets_open)
        yield self.model_name, Sample(ever, "Ever opened.", self.sockets_total)
        for source in self._sources:
            for name, value in source().items():
                yield self.model_name, Sample(name, name.replace("_", " "), value)


def _histogram(name: str, text: str, of_each: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"fastserve:{name}", text, labels=["model_name"])
    for model_name, histogram in of_each.items():
        buckets, total = histogram.buckets()
        family.add_metric([model_name], buckets, total)
    return family
