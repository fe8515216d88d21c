"""The figures of lmdist-serve for Prometheus: requests, tokens, times, and what the batching thread reports about itself.

    metrics = Metrics()
    metrics.follow(service)             # and the one that takes its place
    metrics.page()                      # what GET /metrics answers

A service has a registry of its own, so that a program may have several. This module knows no HTTP and no request.
"""

from __future__ import annotations

import weakref
from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from itertools import count
from weakref import WeakValueDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdist_export.serving.batching import Batcher, Figures
from lmdist_export.serving.service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """What is counted and measured."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.batching = Batching()
        self.follow = self.batching.follow
        self.registry.register(self.batching)
        self.requests = Counter("lmdist_requests", "Requests by route and status.", ["route", "status"], registry=self.registry)
        self.open_requests = Gauge("lmdist_open_requests", "Requests that are being answered.", registry=self.registry)
        self.seconds = Histogram(
            "lmdist_request_seconds", "Time to the end of an answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "lmdist_time_to_first_token_seconds",
            "Time to a stream's first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("lmdist_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.generated_tokens = Counter(
            "lmdist_generated_tokens", "Tokens that were generated; its rate is tokens per second.", registry=self.registry
        )
        self.model = Gauge("lmdist_model_info", "The model that answers: 1.", ["name", "version"], registry=self.registry)

    def page(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Batching(Collector):
    """What the batching threads of services report when they are asked, and what those have counted that are gone."""

    def __init__(self) -> None:
        self.services: WeakValueDictionary[int, Service] = WeakValueDictionary()
        self.gone = Figures(0, 0, 0, 0, {}, 0, 0)
        self.numbers = count()

    def follow(self, service: Service) -> None:
        """Report the figures of a service too, as long as there is a request that it answers, and then what it has counted."""
        self.services[next(self.numbers)] = service
        weakref.finalize(service, self.forget, service.batcher).atexit = False

    def forget(self, batcher: Batcher) -> None:
        """Keep what was counted for a service that is gone."""
        self.gone = together([self.gone, batcher.figures()])

    def collect(self) -> Iterable[Metric]:
        """Yield the figures of this moment."""
        now = together([self.gone, *(service.batcher.figures() for service in [*self.services.values()])])
        yield GaugeMetricFamily("lmdist_queued_requests", "Requests of which nothing was read yet.", now.requests_waiting)
        yield GaugeMetricFamily("lmdist_running_requests", "Requests that the batching thread works on.", now.requests_running)
        yield GaugeMetricFamily(
            "lmdist_queued_tokens", "Tokens to read and to write, at most, for all requests.", now.tokens_queued
        )
        yield GaugeMetricFamily("lmdist_batch_rows", "Texts in the last inference call.", now.rows)
        yield CounterMetricFamily("lmdist_tokens_read", "Tokens that the model has read.", now.tokens_read)
        yield CounterMetricFamily("lmdist_tokens_written", "Tokens that the model has generated.", now.tokens_written)
        calls = now.calls_by_rows.items()
        buckets = [(str(float(most)), sum(number for rows, number in calls if rows <= most)) for most in ROWS]
        buckets.append(("+Inf", sum(now.calls_by_rows.values())))
        total = sum(rows * number for rows, number in calls)
        yield HistogramMetricFamily("lmdist_batch_size", "Texts in an inference call.", buckets=buckets, sum_value=total)


def together(figures: Sequence[Figures]) -> Figures:
    """Return the sums of figures, and the rows of the last ones."""
    calls: Counts[int] = Counts()
    for one in figures:
        calls.update(one.calls_by_rows)
    sums = {
        name: sum(getattr(one, name) for one in figures)
        for name in ("requests_waiting", "requests_running", "tokens_queued", "tokens_read", "tokens_written")
    }
    return Figures(rows=figures[-1].rows, calls_by_rows=dict(calls), **sums)
