"""What real clients and suites check of an OpenAI-compatible server, one test for each point."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.api.responses import ChatChunk, Completion
from gateway.messages import Delta
from placement.policy import ApiPolicy
from tests.gateway.api.serving import (
    CONTEXT,
    END,
    NAME,
    TEXT,
    Api,
    api_of,
    error_of,
    events_of,
    http_server,
    saying,
    until_running,
)
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

ENDPOINTS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{NAME}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


class Engine(FakeEngine):
    """Answers `tokens` tokens, then ends every sequence with an error."""

    def __init__(self, store: Path, tokens: int, status: int = 500) -> None:
        super().__init__(saying(store, TEXT))
        self._tokens, self._status = tokens, status

    def _advance(self, request_id: str) -> Delta:
        if self.running[request_id][1] < self._tokens:
            return super()._advance(request_id)
        del self.running[request_id]
        return Delta(
            request_id=request_id,
            token_ids=[],
            finish_reason="error",
            error="It went wrong.",
            error_status=self._status,
        )


class TestErrors:
    async def test_the_body_is_an_error_object_and_never_fastapis_detail(self, api: Api) -> None:
        answers = [
            await api.completion(temperature=5),
            await api.post("/v1/completions"),
            await api.post("/v1/unknown"),
            await api.http.get("/v1/completions"),
            await api.http.post("/v1/completions", content=b"{"),
        ]
        for answer in answers:
            assert set(answer.json()) == {"error"}
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "detail" not in answer.json()

    async def test_there_is_no_traceback(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.api.app.completion_job", lambda *_: 1 / 0)
        answer = await api.completion()
        assert error_of(answer, 500)["type"] == "server_error"
        assert "ZeroDivision" not in answer.text

    async def test_every_answer_has_an_x_request_id(self, api: Api) -> None:
        for method, path in ENDPOINTS:
            answer = await api.http.request(method, path, json={} if method == "POST" else None)
            assert answer.headers["x-request-id"], path
        assert (await api.post("/v1/unknown")).headers["x-request-id"]

    def test_the_official_client_repeats_a_503_and_obeys_retry_after(self, store: Path) -> None:
        class Recovering(Engine):
            def add(self, submit: Any) -> None:
                self._tokens = 0 if not self.submitted else 1000
                super().add(submit)

        engine = Recovering(store, 0, status=503)
        with (
            http_server(store, engine) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as client,
        ):
            answer = client.completions.create(model=NAME, prompt="def", max_tokens=5)
            assert answer.choices[0].finish_reason == "length"
            assert len(engine.submitted) == 2

    async def test_overload_is_429_and_says_when_to_come_again(self, store: Path) -> None:
        async with api_of(store, Engine(store, 0, status=429)) as api:
            for stream in (False, True):
                answer = await api.completion(stream=stream)
                error_of(answer, 429)
                assert int(answer.headers["retry-after"]) >= 1

    async def test_draining_is_503(self, store: Path) -> None:
        engine = FakeEngine(saying(store, TEXT), paced=True)
        async with api_of(store, engine, policy=ApiPolicy(drain_s=30)) as api:
            running = asyncio.create_task(api.completion())
            await until_running(engine, 1)
            stop = asyncio.Event()

            async def live() -> None:
                async with api.app.router.lifespan_context(api.app):
                    await stop.wait()

            living = asyncio.create_task(live())
            stop.set()
            while (answer := await api.http.get("/health")).status_code == 200:
                await asyncio.sleep(0.01)
            error_of(answer, 503)
            error_of(await api.completion(), 503)
            engine.stop_pacing()
            assert (await running).status_code == 200
            await living


class TestStreams:
    async def test_every_event_is_data_json_and_done_is_the_last(self, api: Api) -> None:
        for answer in (await api.completion(stream=True), await api.chat(stream=True)):
            assert re.fullmatch(r"(data: \{[^\n]*\}\n\n)+data: \[DONE\]\n\n", answer.text)
            assert answer.headers["content-type"].startswith("text/event-stream")

    async def test_done_is_last_even_after_an_error(self, store: Path) -> None:
        async with api_of(store, Engine(store, 3)) as api:
            *_, last = events_of(await api.chat(stream=True))  # which checks for [DONE]
            assert last["error"]["message"] == "It went wrong."

    async def test_the_first_chat_chunk_has_the_role(self, api: Api) -> None:
        chunks = events_of(await api.chat(stream=True))
        assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant"] + [None] * (
            len(chunks) - 1
        )

    async def test_there_is_one_finish_reason_for_each_index(self, api: Api) -> None:
        for answer in (await api.completion(stream=True, n=3), await api.chat(stream=True, n=3)):
            ends = [
                choice["index"] for chunk in events_of(answer) for choice in chunk["choices"] if choice["finish_reason"]
            ]
            assert sorted(ends) == [0, 1, 2]

    async def test_the_stream_joined_is_the_text_without_one(self, api: Api) -> None:
        whole = (await api.completion(stop=["done"])).json()["choices"][0]["text"]
        parts = events_of(await api.completion(stop=["done"], stream=True))
        assert "".join(part["choices"][0]["text"] for part in parts) == whole
        chat = (await api.chat()).json()["choices"][0]["message"]["content"]
        chunks = events_of(await api.chat(stream=True))
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == chat

    async def test_chunks_look_as_documented(self, api: Api) -> None:
        for chunk in events_of(await api.chat(stream=True, stream_options={"include_usage": True})):
            ChatChunk.model_validate(chunk, strict=True)
        for chunk in events_of(await api.completion(stream=True, stream_options={"continuous_usage_stats": True})):
            Completion.model_validate(chunk, strict=True)

    async def test_include_usage_adds_a_last_chunk_without_choices(self, api: Api) -> None:
        *chunks, last = events_of(await api.completion(stream=True, stream_options={"include_usage": True}))
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert not any("usage" in chunk for chunk in events_of(await api.completion(stream=True)))

    async def test_stream_options_without_stream_are_400(self, api: Api) -> None:
        for answer in (
            await api.completion(stream_options={"include_usage": True}),
            await api.chat(stream_options={"include_usage": True}, stream=False),
        ):
            assert error_of(answer, 400)["param"] == "stream_options"


class TestRequests:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_prompt_longer_than_the_context_is_400_in_the_words_that_clients_match(
        self, api: Api, stream: bool
    ) -> None:
        for answer in (
            await api.completion(prompt=[5] * CONTEXT, stream=stream),
            await api.chat("word " * 100, stream=stream),
        ):
            message = error_of(answer, 400)["message"]
            assert message.startswith(f"This model's maximum context length is {CONTEXT} tokens. However, ")

    async def test_an_unknown_model_is_404(self, api: Api) -> None:
        error_of(await api.completion(model="gpt-5"), 404)
        error_of(await api.chat(model="gpt-5"), 404)
        error_of(await api.http.get("/v1/models/gpt-5"), 404)

    @pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
    async def test_an_empty_prompt_is_400(self, api: Api, prompt: Any) -> None:
        assert error_of(await api.completion(prompt=prompt), 400)["param"] == "prompt"

    async def test_a_token_outside_the_vocabulary_is_400(self, api: Api) -> None:
        assert "out of the vocabulary" in error_of(await api.completion(prompt=[10**6]), 400)["message"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("seed", "x"),
            ("presence_penalty", 9),
            ("frequency_penalty", "much"),
            ("logit_bias", {"x": 1}),
            ("logit_bias", 5),
            ("top_logprobs", 99),
        ],
    )
    async def test_a_bad_seed_penalty_bias_or_top_logprobs_is_400_and_named(
        self, api: Api, field: str, value: Any
    ) -> None:
        assert error_of(await api.chat(**{field: value}), 400)["param"].startswith(field)

    async def test_echo_and_logprobs_come_in_both_shapes(self, api: Api) -> None:
        completion = (await api.completion(prompt="def", echo=True, logprobs=1)).json()["choices"][0]
        assert completion["text"].startswith("def")
        assert set(completion["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert completion["logprobs"]["token_logprobs"][0] is None
        chat = (await api.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]
        for token in chat["logprobs"]["content"]:
            assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}

    async def test_unknown_fields_are_ignored(self, api: Api) -> None:
        assert (await api.chat(some_new_field={"a": 1}, user="me", store=False)).status_code == 200

    @pytest.mark.parametrize(
        "body",
        [
            {"stop": None},
            {"ignore_eos": True, "max_tokens": 3},
            {"min_tokens": 2, "max_tokens": 5},
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            {"max_completion_tokens": 4},
        ],
    )
    async def test_what_other_servers_take_is_taken(self, api: Api, body: dict[str, Any]) -> None:
        assert (await api.chat(**body)).status_code == 200

    async def test_content_may_come_in_parts(self, api: Api) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert (await api.chat(parts)).status_code == 200
        assert api.engine.submitted[-1].prompt_token_ids == await _rendered(api, "a\nb")

    @pytest.mark.parametrize(
        ("prompt", "choices"), [("def", 1), (["def", "add"], 2), ([5, 6], 1), ([[5], [6, 7], [8]], 3)]
    )
    async def test_prompts_come_in_four_forms(self, api: Api, prompt: Any, choices: int) -> None:
        answer = (await api.completion(prompt=prompt, max_tokens=2)).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(choices))

    async def test_several_answers_to_one_prompt(self, api: Api) -> None:
        answer = (await api.completion(prompt=["a", "b"], n=2, max_tokens=2)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]

    @pytest.mark.parametrize("stop", ["return", ["zzz", "return a"], "🙂", "naïve", "日本"])
    async def test_a_stop_string_never_leaks_across_chunks(self, api: Api, stop: Any) -> None:
        first = stop if isinstance(stop, str) else stop[-1]
        parts = events_of(await api.completion(stop=stop, stream=True))
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert text == TEXT[: TEXT.index(first)]
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"

    async def test_the_end_token_is_no_text(self, api: Api) -> None:
        assert END not in (await api.completion()).text


async def _rendered(api: Api, content: str) -> list[int]:
    answer = await api.post("/tokenize", messages=[{"role": "user", "content": content}])
    tokens: list[int] = answer.json()["tokens"]
    return tokens


class TestServer:
    @pytest.fixture
    async def gone(self, store: Path) -> AsyncIterator[str]:
        """The URL of a server that twenty clients just left."""
        engine = FakeEngine(saying(store, TEXT), paced=True)
        with http_server(store, engine, context_length=10**9) as url:
            address = httpx.URL(url)
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
            body = b'{"prompt": [5], "max_tokens": 100000000, "stream": true, "ignore_eos": true}'
            clients = [socket.create_connection((address.host, address.port or 0)) for _ in range(20)]
            for client in clients:
                client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            await until_running(engine, 20)
            for client in clients:
                client.close()
            engine.stop_pacing()
            yield url

    async def test_gauges_return_to_what_they_were_when_clients_leave(self, gone: str) -> None:
        async with httpx.AsyncClient(base_url=gone, timeout=30) as http:
            async with asyncio.timeout(20):
                while any((await _gauges(http)).values()):
                    await asyncio.sleep(0.05)
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200

    @pytest.mark.parametrize(("method", "path"), ENDPOINTS)
    async def test_every_endpoint_is_there(self, api: Api, method: str, path: str) -> None:
        bodies: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
            "/v1/completions": {"prompt": "a"},
            "/tokenize": {"prompt": "a"},
            "/detokenize": {"tokens": [5]},
        }
        answer = await api.http.request(method, path, json=bodies.get(path))
        assert answer.status_code == 200, answer.text


async def _gauges(http: httpx.AsyncClient) -> dict[str, float]:
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return {family.name: family.samples[0].value for family in families if family.name in names}
