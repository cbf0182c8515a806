"""What the fleet's address says of itself at /metrics; each replica has its own, at its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .peer import Peer

__all__ = ["CONTENT_TYPE_LATEST", "text_of"]


class Counted(Protocol):
    @property
    def peers(self) -> Mapping[str, Peer]: ...
    @property
    def cut_off(self) -> int: ...

    asked: int
    retried: int
    refused: int


class _Numbers(Collector):
    def __init__(self, front: Counted) -> None:
        self._front = front

    def collect(self) -> Iterator[Metric]:
        front = self._front
        counts = {
            "requests": (front.asked, "Requests that came."),
            "retried": (front.retried, "Tries that another replica took over."),
            "cut_off": (front.cut_off, "Answers whose replica was lost in their middle."),
            "refused": (front.refused, "Requests that no replica answered."),
        }
        for name, (count, text) in counts.items():
            yield CounterMetricFamily(f"fastserve:fleet_{name}", text, value=count)
        ready = "Replicas that are ready."
        yield GaugeMetricFamily("fastserve:fleet_replicas", ready, value=len(front.peers))
        text = "Requests that each replica has."
        running = GaugeMetricFamily("fastserve:fleet_in_flight", text, labels=["replica"])
        for peer in front.peers.values():
            running.add_metric([peer.name], peer.in_flight)
        yield running


def text_of(front: Counted) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(front))
    return generate_latest(registry)
