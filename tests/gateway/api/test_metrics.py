"""/metrics: vLLM's names, and figures that follow what happens."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.api.metrics import Metrics
from gateway.layer_times import LayerTimes
from gateway.messages import Delta, GatewayStatus, Timings
from tests.gateway.api.serving import NAME, TEXT, Api, api_of, error_of, saying, until_running
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
COUNTERS = {
    "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success", "vllm:num_preemptions",
    "vllm:prefix_cache_queries", "vllm:prefix_cache_hits",
}  # fmt: skip
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
    "vllm:request_time_per_output_token_seconds", "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds",
}  # fmt: skip


async def figures(api: Api) -> dict[str, float]:
    """Sample -> value; labels other than the model's name are part of the sample's name."""
    answer = await api.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            if sample.name.startswith(("vllm:", "evermoe:")):
                assert sample.labels["model_name"] == NAME
            found[sample.name + "".join(f"{{{value}}}" for value in labels.values())] = sample.value
    return found


async def test_the_names_are_vllms(api: Api) -> None:
    await api.completion()
    text = (await api.http.get("/metrics")).text
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name for name, kind in types.items() if kind == "gauge"} >= GAUGES
    assert {name for name, kind in types.items() if kind == "counter"} >= COUNTERS
    assert {name for name, kind in types.items() if kind == "histogram"} >= HISTOGRAMS
    for sample in ("vllm:prompt_tokens_total{", "vllm:generation_tokens_total{", "vllm:request_success_total{"):
        assert sample in text


async def test_the_buckets_are_vllms(api: Api) -> None:
    text = (await api.http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def bounds(name: str) -> list[float]:
        return [float(sample.labels["le"]) for sample in families[name].samples if "le" in sample.labels]

    assert bounds("vllm:time_to_first_token_seconds")[:3] == [0.001, 0.005, 0.01]
    assert bounds("vllm:time_to_first_token_seconds")[-2:] == [2560, float("inf")]
    assert bounds("vllm:inter_token_latency_seconds")[:3] == [0.01, 0.025, 0.05]
    assert bounds("vllm:inter_token_latency_seconds")[-2:] == [80, float("inf")]


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_and_latencies_are_counted(api: Api, stream: bool) -> None:
    await api.completion(prompt=[5, 6, 7], max_tokens=10, stream=stream)
    await api.completion(prompt=[5], max_tokens=60, n=2, stream=stream)
    seen = await figures(api)
    tokens = seen["vllm:generation_tokens_total"]
    assert seen["vllm:prompt_tokens_total"] == 4
    assert tokens > 10
    assert seen["vllm:request_success_total{length}"] == 1
    assert seen["vllm:request_success_total{stop}"] == 2
    assert seen["vllm:time_to_first_token_seconds_count"] == 3
    assert seen["vllm:inter_token_latency_seconds_count"] == tokens - 3
    assert seen["vllm:request_time_per_output_token_seconds_count"] == 3
    assert seen["vllm:e2e_request_latency_seconds_count"] == 3
    assert seen["vllm:e2e_request_latency_seconds_sum"] >= seen["vllm:time_to_first_token_seconds_sum"]


async def test_a_stop_string_is_a_stop_and_a_client_that_leaves_an_abort(store: Path) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with api_of(store, engine) as api:
        stopping = asyncio.create_task(api.completion(stop="add"))
        leaving = asyncio.create_task(api.completion())
        await until_running(engine, 2)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        engine.stop_pacing()
        assert (await stopping).status_code == 200
        seen = await figures(api)
        assert seen["vllm:request_success_total{stop}"] == 1
        assert seen["vllm:request_success_total{abort}"] == 1


async def test_running_sequences_are_seen_and_gone(store: Path) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with api_of(store, engine) as api:
        request = asyncio.create_task(api.completion(n=2))
        await until_running(engine, 2)
        assert (await figures(api))["vllm:num_requests_running"] == 2
        engine.stop_pacing()
        await request
        assert (await figures(api))["vllm:num_requests_running"] == 0


async def test_experts_and_requests_have_figures_of_ours(api: Api) -> None:
    error_of(await api.completion(temperature=-1), 400)
    await api.post("/nowhere")
    seen = await figures(api)
    assert seen["evermoe:expert_calls_total{replica}"] == 4
    assert seen["evermoe:expert_calls_total{inline}"] == 3
    assert seen["evermoe:expert_resident_bytes{expert-0}"] == 4096
    assert seen["evermoe:expert_misses_total"] == 2
    assert seen["evermoe:emulated_devices"] == 1
    assert seen["evermoe:inline_resident_bytes"] == 0
    assert seen["evermoe:expert_replicas{expert-0}{planned}"] == 2
    assert seen["evermoe:expert_replicas{expert-0}{ready}"] == 1
    assert seen["evermoe:gateways"] == 1
    assert seen["evermoe:http_requests_total{/v1/completions}{400}"] == 1
    assert seen["evermoe:http_requests_total{none}{404}"] == 1
    assert seen["process_resident_memory_bytes"] > 0


@pytest.mark.parametrize(("age_s", "told"), [(1.0, True), (3600.0, False)])
def test_the_errors_of_a_forecast_are_told_while_it_is_fresh(age_s: float, told: bool) -> None:
    layers = [{"layer": 2, "error": 0.25}, {"layer": 3, "error": None}]
    report = {"gateways": [], "units": [], "forecast": {"made_at": time.time() - age_s, "layers": layers}}
    text = Metrics(NAME).exposition(report).decode()
    samples = [line for line in text.splitlines() if line.startswith("evermoe:forecast_error_ratio{")]
    assert samples == [f'evermoe:forecast_error_ratio{{layer="2",model_name="{NAME}"}} 0.25'] * told


def test_the_times_of_layers_are_summed_over_gateways() -> None:
    gateways = []
    for name, seconds in (("a", [0.001, 0.002]), ("b", [0.5])):
        times = LayerTimes()
        for each in seconds:
            times.observe(each)
        status = GatewayStatus(
            query_id=0, gateway=name, running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=1, expert_calls={},
            layer_counts=times.counts, layer_seconds=times.seconds,
        )  # fmt: skip
        gateways.append(msgspec.to_builtins(status))
    text = Metrics(NAME).exposition({"gateways": gateways, "units": []}).decode()
    seen = [line for line in text.splitlines() if line.startswith("evermoe:moe_layer_seconds")]
    values = [float(line.split()[-1]) for line in seen]
    assert sorted(set(values)) == [0, pytest.approx(0.503), 1, 2, 3]
    assert any('le="+Inf"' in line and line.endswith(" 3.0") for line in seen)


async def test_without_a_gateway_there_are_still_metrics(api: Api) -> None:
    for client in list(api.pool._clients.values()):
        await client.aclose()
    api.pool._addresses = _nobody
    api.pool._refreshed = 0.0
    seen = await figures(api)
    assert (seen["evermoe:gateways"], seen["vllm:num_requests_running"]) == (0, 0)


async def _nobody() -> list[str]:
    return []


class TimingEngine(FakeEngine):
    """Says how long it took."""

    def _advance(self, request_id: str) -> Delta:
        delta = super()._advance(request_id)
        if delta.finish_reason is None:
            return delta
        return msgspec.structs.replace(delta, timings=Timings(queue_s=0.5, prefill_s=1.5, decode_s=20))


async def test_the_gateways_own_timings_are_passed_on(store: Path) -> None:
    async with api_of(store, TimingEngine(saying(store, TEXT))) as api:
        await api.completion(max_tokens=5)
        seen = await figures(api)
        assert seen["vllm:request_queue_time_seconds_sum"] == 0.5
        assert seen["vllm:request_prefill_time_seconds_sum"] == 1.5
        assert seen["vllm:request_decode_time_seconds_sum"] == 20
