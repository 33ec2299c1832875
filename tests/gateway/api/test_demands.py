"""What a request asks of the scheduler, and what the scheduler refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.messages import Delta, Submit
from placement.policy import ApiPolicy
from tests.gateway.api.serving import NAME, Api, api_of, error_of, events_of, saying
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


class RefusingEngine(FakeEngine):
    """Ends every sequence, after `tokens` tokens, with the same error."""

    def __init__(self, reply: Any, tokens: int, **error: Any) -> None:
        super().__init__(reply)
        self._tokens = tokens
        self._error = error

    def _advance(self, request_id: str) -> Delta:
        if self.running[request_id][1] >= self._tokens:
            del self.running[request_id]
            return Delta(request_id=request_id, token_ids=[], finish_reason="error", **self._error)
        return super()._advance(request_id)


async def submitted(api: Api, headers: dict[str, str] | None = None, **body: Any) -> Submit:
    answer = await api.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return api.engine.submitted[-1]


async def test_priority_is_passed_on(api: Api) -> None:
    assert (await submitted(api)).priority == 0
    assert (await submitted(api, priority=-3)).priority == -3
    assert error_of(await api.completion(priority="high"), 400)["param"] == "priority"


async def test_the_shorter_of_the_clients_and_the_operators_deadline_counts(store: Path, api: Api) -> None:
    assert (await submitted(api)).deadline_s is None
    assert (await submitted(api, {"x-request-timeout": "2.5"})).deadline_s == pytest.approx(2.5, abs=0.1)
    async with api_of(store, policy=ApiPolicy(request_timeout_s=10)) as bounded:
        assert (await submitted(bounded)).deadline_s == pytest.approx(10, abs=0.1)
        assert (await submitted(bounded, {"x-request-timeout": "2"})).deadline_s == pytest.approx(2, abs=0.1)
        assert (await submitted(bounded, {"x-request-timeout": "99"})).deadline_s == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
async def test_a_deadline_that_is_none_is_refused_by_name(api: Api, value: str) -> None:
    answer = await api.http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": value})
    error = error_of(answer, 400)
    assert error["param"] == "x-request-timeout"
    assert "`x-request-timeout` is not valid" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_a_429_before_the_stream_begins(store: Path, stream: bool) -> None:
    engine = RefusingEngine(saying(store, "x"), 0, error="Too many wait.", error_status=429, retry_after_s=6.2)
    async with api_of(store, engine) as api:
        answer = await api.completion(stream=stream)
        assert error_of(answer, 429) == {
            "message": "Too many wait.", "type": "rate_limit_error", "param": None, "code": "overloaded",
        }  # fmt: skip
        assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_that_passes_is_a_504_that_clients_do_not_repeat(store: Path, stream: bool) -> None:
    engine = RefusingEngine(saying(store, "x"), 0, error="The deadline passed.", error_status=504)
    async with api_of(store, engine) as api:
        answer = await api.completion(stream=stream)
        assert error_of(answer, 504)["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"


async def test_in_mid_stream_it_is_the_last_event(store: Path) -> None:
    engine = RefusingEngine(saying(store, "abcdefgh"), 3, error="The deadline passed.", error_status=504)
    async with api_of(store, engine) as api:
        *chunks, last = events_of(await api.completion(model=NAME, stream=True))
        assert chunks
        assert last["error"]["code"] == "deadline_exceeded"
