"""The figures of lmdist-serve for Prometheus: requests, tokens, times, and what the batching thread reports about itself.

    metrics = Metrics(batcher_figures)
    metrics.page()                      # what GET /metrics answers

A service has a registry of its own, so that a program may have several. This module knows no HTTP and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdist_export.serving.batching import Figures

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """What is counted and measured."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        """Count from now on; `figures` returns what the batching thread reports."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(Batching(figures))
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
    """What the batching thread reports when it is asked."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self.figures = figures

    def collect(self) -> Iterable[Metric]:
        """Yield the figures of this moment."""
        now = self.figures()
        yield GaugeMetricFamily("lmdist_queued_requests", "Requests of which nothing was read yet.", now.requests_waiting)
        yield GaugeMetricFamily("lmdist_running_requests", "Requests that the batching thread works on.", now.requests_running)
        yield GaugeMetricFamily(
            "lmdist_queued_tokens", "Tokens to read and to write, at most, for all requests.", now.tokens_queued
        )
        yield GaugeMetricFamily("lmdist_batch_rows", "Texts in the last inference call.", now.rows)
        yield CounterMetricFamily("lmdist_tokens_read", "Tokens that the model has read.", now.tokens_read)
        yield CounterMetricFamily("lmdist_tokens_written", "Tokens that the model has generated.", now.tokens_written)
        sizes = sorted(now.calls_by_rows)
        sums = accumulate(now.calls_by_rows[rows] for rows in sizes)
        buckets = [(str(float(rows)), calls) for rows, calls in zip(sizes, sums, strict=True)]
        buckets.append(("+Inf", sum(now.calls_by_rows.values())))
        total = sum(rows * calls for rows, calls in now.calls_by_rows.items())
        yield HistogramMetricFamily("lmdist_batch_size", "Texts in an inference call.", buckets=buckets, sum_value=total)
