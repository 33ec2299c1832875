"""Whatever is wrong with a request, the answer is one OpenAI error that names what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gateway.messages import Delta
from tests.gateway.api.serving import CONTEXT, NAME, Api, api_of, error_of, events_of, saying
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


class TestBodies:
    @pytest.mark.parametrize("body", [b"{", b"", b'{"prompt": "a",}', b"\xff\xfe", b"[" * 100_000])
    async def test_malformed_json(self, api: Api, body: bytes) -> None:
        error_of(await api.http.post("/v1/completions", content=body, headers=JSON), 400)

    @pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"null"])
    async def test_json_that_is_no_object(self, api: Api, body: bytes) -> None:
        error_of(await api.http.post("/v1/completions", content=body, headers=JSON), 400)

    async def test_a_body_of_another_type_is_told_which_is_wanted(self, api: Api) -> None:
        body = b'{"prompt": "a"}'
        error = error_of(await api.http.post("/v1/completions", content=body, headers={"content-type": "text/a"}), 400)
        assert "Content-Type: application/json" in error["message"]

    async def test_a_missing_prompt(self, api: Api) -> None:
        error = error_of(await api.post("/v1/completions", model=NAME), 400)
        assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")

    async def test_unknown_fields_are_ignored(self, api: Api) -> None:
        assert (await api.completion(user="me", metadata={"a": 1}, frobnicate=[1])).status_code == 200


class TestParameters:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", "hot"),
            ("temperature", True),
            ("top_p", 0),
            ("top_p", 1.1),
            ("top_k", -2),
            ("top_k", 1.5),
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", "5"),
            ("n", 0),
            ("n", 129),
            ("seed", "x"),
            ("seed", 2**63),
            ("seed", 1.5),
            ("min_tokens", -1),
            ("min_tokens", 61),
            ("stop", ""),
            ("stop", 5),
            ("stop", [""]),
            ("stop", ["a"] * 17),
            ("stop_token_ids", [-1]),
            ("stop_token_ids", [100_000]),
            ("stop_token_ids", ["a"]),
            ("stream", "yes"),
            ("stream_options", {"include_usage": True}),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("presence_penalty", 2.1),
            ("presence_penalty", "much"),
            ("frequency_penalty", -2.1),
            ("repetition_penalty", 0),
            ("repetition_penalty", -1),
            ("logit_bias", [5]),
            ("logit_bias", {"5": 101}),
            ("logit_bias", {"5": -101}),
            ("logit_bias", {"5": "x"}),
            ("logit_bias", {"a": 1}),
            ("logit_bias", {"-1": 1}),
            ("logit_bias", {"1.5": 1}),
            ("logit_bias", {"100000": 1}),
            ("logit_bias", {"9" * 5000: 1}),
            ("logprobs", -1),
            ("logprobs", 21),
            ("logprobs", True),
            ("logprobs", "5"),
            ("echo", "yes"),
            ("best_of", 0),
            ("response_format", "json"),
            ("response_format", {}),
            ("response_format", {"type": "xml"}),
            ("response_format", {"type": "json_schema"}),
            ("response_format", {"type": "json_schema", "json_schema": {}}),
            ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": "b"}}),
            ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}),
            ("prompt", ""),
            ("prompt", []),
            ("prompt", [""]),
            ("prompt", [[]]),
            ("prompt", None),
            ("prompt", 5),
            ("prompt", {"a": 1}),
            ("prompt", ["a", 1]),
            ("prompt", [1.5]),
            ("prompt", [True]),
            ("prompt", [-1]),
            ("prompt", [100_000]),
            ("prompt", [[1], [100_000]]),
            ("prompt", "\ud800"),
            ("prompt", ["a"] * 2049),
        ],
    )
    async def test_a_bad_value_is_refused_by_name(self, api: Api, name: str, value: Any) -> None:
        error = error_of(await api.completion(**{name: value}), 400)
        assert re.split(r"[.\[]", error["param"])[0] == name
        assert error["type"] == "invalid_request_error"
        assert name in error["message"]
        assert not api.engine.submitted

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
    async def test_numbers_must_be_finite(self, api: Api, number: bytes) -> None:
        body = b'{"prompt": "a", "temperature": %s}' % number
        error = error_of(await api.http.post("/v1/completions", content=body, headers=JSON), 400)
        assert error["param"] == "temperature"

    async def test_the_message_says_what_is_wanted(self, api: Api) -> None:
        error = error_of(await api.completion(prompt=[1.5]), 400)
        assert error["message"] == (
            "`prompt` is not valid: it must be a string, a list of strings, a list of token ids, or a list of lists of "
            "token ids."
        )

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": [{"content": "hi"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": "a"}, {"role": 5, "content": "b"}]}, "messages[1].role"),
            ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
            ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls"),
            ({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0}, "max_completion_tokens"),
        ],
    )
    async def test_bad_conversations_are_refused_by_name(self, api: Api, body: dict[str, Any], param: str) -> None:
        assert error_of(await api.post("/v1/chat/completions", **body), 400)["param"] == param

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("suffix", "end"),
            ("best_of", 2),
            ("prompt_logprobs", 1),
            ("use_beam_search", True),
            ("guided_regex", "a+"),
        ],
    )
    async def test_what_is_not_served_is_refused_and_not_ignored(self, api: Api, name: str, value: Any) -> None:
        error = error_of(await api.completion(**{name: value}), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("tools", [{"type": "function"}]),
            ("tool_choice", "required"),
            ("functions", [{"name": "f"}]),
            ("audio", {"voice": "a"}),
            ("modalities", ["text", "audio"]),
            ("chat_template", "{{ messages }}"),
            ("continue_final_message", True),
        ],
    )
    async def test_so_it_is_for_chat(self, api: Api, name: str, value: Any) -> None:
        error = error_of(await api.chat(**{name: value}), 400)
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")

    async def test_asking_for_nothing_of_it_is_fine(self, api: Api) -> None:
        nothing = {
            "logprobs": None, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
            "best_of": 1, "suffix": None, "response_format": {"type": "text"}, "repetition_penalty": 1.0,
        }  # fmt: skip
        assert (await api.completion(**nothing)).status_code == 200
        chat = {
            "logprobs": False,
            "tools": [],
            "tool_choice": "none",
            "top_logprobs": None,
            "parallel_tool_calls": True,
        }
        assert (await api.chat(**chat)).status_code == 200


class TestContext:
    async def test_a_prompt_that_fills_the_context_is_refused_before_the_stream_begins(self, api: Api) -> None:
        response = await api.completion(prompt=[5] * CONTEXT, max_tokens=None, stream=True)
        error = error_of(response, 400)
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, ")
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")

    async def test_so_is_an_answer_that_does_not_fit_behind_it(self, api: Api) -> None:
        error = error_of(await api.completion(prompt=[5] * 40, max_tokens=25), 400)
        assert error["message"] == (
            "This model's maximum context length is 64 tokens. However, you requested 65 tokens (40 in the prompt, 25 "
            "in the completion). Please reduce the length of the prompt or completion."
        )

    async def test_a_long_conversation_is_told_the_same(self, api: Api) -> None:
        error = error_of(await api.chat("word " * 100), 400)
        assert error["message"].startswith("This model's maximum context length is 64 tokens. However, ")
        assert error["param"] == "messages"

    async def test_the_last_token_that_fits_is_served(self, api: Api) -> None:
        assert (await api.completion(prompt=[5] * (CONTEXT - 1), max_tokens=1)).status_code == 200

    async def test_the_operator_may_allow_less_than_the_model_can(self, store: Path) -> None:
        async with api_of(store, context_length=32) as api:
            error = error_of(await api.completion(prompt=[5] * 32), 400)
            assert error["message"].startswith("This model's maximum context length is 32 tokens.")


class TestRoutesAndNames:
    async def test_an_unknown_model_is_404(self, api: Api) -> None:
        for response in (await api.completion(model="gpt-5"), await api.chat(model="gpt-5")):
            error = error_of(response, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
            assert error["message"] == f"The model `gpt-5` does not exist; this server has `{NAME}`."

    async def test_a_name_that_no_encoding_can_hold_is_404_too(self, api: Api) -> None:
        body = b'{"model": "\\ud800", "prompt": "a"}'
        error_of(await api.http.post("/v1/completions", content=body, headers=JSON), 404)

    async def test_a_model_that_is_not_named_is_the_one_there_is(self, api: Api) -> None:
        assert (await api.completion(model=None)).json()["model"] == NAME

    async def test_an_unknown_route_is_404(self, api: Api) -> None:
        assert "/v1/embeddings" in error_of(await api.post("/v1/embeddings"), 404)["message"]

    async def test_a_wrong_method_is_405_and_says_which_is_right(self, api: Api) -> None:
        response = await api.http.get("/v1/completions")
        assert "GET" in error_of(response, 405)["message"]
        assert response.headers["allow"] == "POST"


class TestRequestIds:
    async def test_every_answer_has_one(self, api: Api) -> None:
        answers = [await api.completion(), await api.completion(stream=True), await api.http.get("/health")]
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3

    async def test_it_is_left_to_a_proxy_that_answers_with_its_own(self, store: Path) -> None:
        async with api_of(store, request_ids=False) as api:
            assert "x-request-id" not in (await api.http.get("/health")).headers

    async def test_a_clients_own_is_kept(self, api: Api) -> None:
        answer = await api.http.get("/health", headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"

    @pytest.mark.parametrize("given", ["", "two words", "x" * 129])
    async def test_but_not_one_that_is_empty_long_or_unprintable(self, api: Api, given: str) -> None:
        answer = await api.http.get("/health", headers={"x-request-id": given})
        assert answer.headers["x-request-id"].startswith("req-")


class RefusingEngine(FakeEngine):
    """Refuses in the engine what the api let through."""

    def add(self, submit: Any) -> None:
        raise ValueError("A sequence of 70 tokens does not fit the cache.")


class FailingEngine(FakeEngine):
    """Answers three tokens and fails."""

    def _advance(self, request_id: str) -> Delta:
        if self.running[request_id][1] == 3:
            del self.running[request_id]
            return Delta(request_id=request_id, token_ids=[], finish_reason="error", error="The expert is on fire.")
        return super()._advance(request_id)


class TestFailures:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_what_the_engine_refuses_is_a_400(self, store: Path, stream: bool) -> None:
        async with api_of(store, RefusingEngine()) as api:
            error = error_of(await api.completion(stream=stream), 400)
            assert error["message"] == "A sequence of 70 tokens does not fit the cache."

    async def test_a_failure_of_the_engine_is_a_500(self, store: Path) -> None:
        async with api_of(store, FailingEngine(saying(store, "abcdefgh"))) as api:
            error = error_of(await api.completion(), 500)
            assert (error["message"], error["type"]) == ("The expert is on fire.", "server_error")

    @pytest.mark.parametrize("n", [1, 3])
    async def test_in_a_stream_it_is_the_last_event_before_done(self, store: Path, n: int) -> None:
        async with api_of(store, FailingEngine(saying(store, "abcdefgh"))) as api:
            *chunks, last = events_of(await api.completion(stream=True, n=n))
            assert len(chunks) >= 1
            assert all("choices" in chunk for chunk in chunks)
            assert last["error"]["message"] == "The expert is on fire."

    async def test_no_gateway_is_a_503_that_says_when_to_come_again(self, store: Path) -> None:
        async with api_of(store) as api:
            for client in list(api.pool._clients.values()):
                await client.aclose()
            api.pool._addresses = _nobody
            api.pool._refreshed = 0.0
            response = await api.completion()
            assert error_of(response, 503)["code"] == "gateway_unavailable"
            assert response.headers["retry-after"] == "1"
            assert error_of(await api.http.get("/health"), 503)

    async def test_a_bug_is_a_500_without_its_traceback(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def bug(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(" ".join(["a", "secret", "detail"]))

        monkeypatch.setattr("gateway.api.app.CompletionFormat", bug)
        error = error_of(await api.completion(), 500)
        assert "a secret detail" not in error["message"]
        assert "RuntimeError" in caplog.text
        assert "test_errors.py" in caplog.text
        assert "a secret detail" not in caplog.text  # it might be a prompt


async def _nobody() -> list[str]:
    return []
