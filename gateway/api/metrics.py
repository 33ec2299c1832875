"""What Prometheus reads: vLLM's names where vLLM has the figure, so that its dashboards work, and ours beside them.

Latencies and tokens are those of this api process; running and waiting sequences, cache and experts are summed over all
gateways at the moment of asking.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.api.expert_metrics import expert_metrics
from gateway.api.request_record import RequestRecord
from gateway.layer_times import EDGES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_OLD_S = 60.0
_EACH = 8
"""Of the fine buckets of layer times, one in so many is told."""
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """The figures of one api process."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests taken in.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", _TTFT, "Request to first token.")
        self.inter_token = self._histogram("vllm:inter_token_latency_seconds", _TOKEN, "One token to the next.")
        self.per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", _TOKEN, "A sequence's mean time for a token after its first."
        )
        self.end_to_end = self._histogram("vllm:e2e_request_latency_seconds", _REQUEST, "Request to last token.")
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", _REQUEST, "Waited for a place.")
        self.prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", _REQUEST, "From a place to the first token."
        )
        self.decode_time = self._histogram("vllm:request_decode_time_seconds", _REQUEST, "First token to last.")
        self._success = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason: stop, length, error, abort (its client left).",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._requests = Counter(
            "evermoe:http_requests",
            "HTTP requests answered, by route and status (499: the client left).",
            ["model_name", "route", "status"],
            registry=self._registry,
        )

    def finished(self, reason: str) -> None:
        """Count a sequence that ended."""
        self._success.labels(self._model, reason).inc()

    def answered(self, record: RequestRecord) -> None:
        """Count a request that ended."""
        self._requests.labels(self._model, record.route or "none", str(record.status or 499)).inc()

    def exposition(self, report: Mapping[str, Any]) -> bytes:
        """Prometheus' text format; `report` is the application's status."""
        state = CollectorRegistry(auto_describe=False)
        state.register(_State(self._model, report))
        return generate_latest(self._registry) + generate_latest(state)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, buckets: Iterable[float], text: str) -> Histogram:
        found = Histogram(name, text, ["model_name"], buckets=tuple(buckets), registry=self._registry)
        return found.labels(self._model)


class _State(Collector):
    """The figures of a status report."""

    def __init__(self, model: str, report: Mapping[str, Any]) -> None:
        self._model = model
        self._gateways = report["gateways"]
        self._units = report["units"]
        self._forecast = report.get("forecast")

    def collect(self) -> Iterable[Metric]:
        """Prometheus' interface."""
        total = self._sum("kv_blocks_total")
        used = self._sum("kv_blocks_used") / total if total else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", self._sum("running"))
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait for a place.", self._sum("waiting"))
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", used)
        yield self._gauge("evermoe:gateways", "Gateways that answer.", len(self._gateways))
        yield self._counted("vllm:num_preemptions", "Sequences that gave up their place.", "preemptions")
        yield self._counted(
            "vllm:prefix_cache_queries", "Prompt tokens looked for in the cache.", "prefix_cache_queries"
        )
        yield self._counted("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", "prefix_cache_hits")
        yield from expert_metrics(self._model, self._units)
        yield self._gauge(
            "evermoe:inline_resident_bytes", "Expert weights that gateways hold themselves.", self._sum("inline_bytes")
        )
        yield self._counted("evermoe:inline_rows", "Rows of experts that gateways computed themselves.", "inline_rows")
        yield self._layer_times()
        yield from self._forecast_errors()

    def _layer_times(self) -> Metric:
        counts = [sum(column) for column in zip(*(g["layer_counts"] for g in self._gateways), strict=True)]
        totals = dict(zip(EDGES, itertools.accumulate(counts), strict=False))
        buckets = [(f"{edge:.3g}", totals[edge]) for edge in EDGES[_EACH - 1 :: _EACH] if totals]
        family = HistogramMetricFamily(
            "evermoe:moe_layer_seconds", "From a MoE layer's routing to its summed rows.", labels=["model_name"]
        )
        family.add_metric([self._model], [*buckets, ("+Inf", sum(counts))], self._sum("layer_seconds"))
        return family

    def _forecast_errors(self) -> Iterable[Metric]:
        """Of a planner that is there: an old forecast's error says nothing of now."""
        if self._forecast is None or time.time() - self._forecast["made_at"] > _OLD_S:
            return
        errors = GaugeMetricFamily(
            "evermoe:forecast_error_ratio",
            "Part of a layer's rows that forecasts put on wrong experts, 0 to 1, mean of the latest ones.",
            labels=["model_name", "layer"],
        )
        for layer in self._forecast["layers"]:
            if layer["error"] is not None:
                errors.add_metric([self._model, str(layer["layer"])], layer["error"])
        yield errors

    def _sum(self, name: str) -> float:
        return float(sum(gateway[name] for gateway in self._gateways))

    def _counted(self, name: str, text: str, field: str) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], self._sum(field))
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
