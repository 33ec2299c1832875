"""The log of requests: one line each, and nowhere in any log a word of a prompt or an answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.api import request_log
from tests.gateway.api.serving import NAME, Api, api_of, saying
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Path]:
    """Where requests are logged."""
    log = logging.getLogger("evermoe.requests")
    request_log.start(tmp_path / "requests.jsonl")
    yield tmp_path / "requests.jsonl"
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_line_says_who_asked_for_how_much_and_how_it_went(api: Api, lines: Path, stream: bool) -> None:
    api.http.headers["x-request-id"] = "mine"
    await api.completion(prompt=[5, 6], max_tokens=7, ignore_eos=True, n=2, stream=stream)
    [line] = read(lines)
    assert line.pop("time").startswith("20")
    assert line.pop("duration_s") >= line.pop("first_token_s") > 0
    assert line.pop("stream", False) == stream
    assert line == {
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "prompt_tokens": 2,
        "completion_tokens": 14,
        "finish_reasons": {"length": 2},
    }


async def test_errors_are_named_by_code_and_routes_by_pattern(api: Api, lines: Path) -> None:
    await api.completion(temperature=-1)
    await api.http.get("/v1/models/gpt-5")
    await api.http.get("/a-path-with-a-secret")
    logged = [(line.get("route"), line["status"], line.get("error")) for line in read(lines)]
    assert logged == [
        ("/v1/completions", 400, "invalid_value"),
        ("/v1/models/{name:path}", 404, "model_not_found"),
        (None, 404, None),
    ]


async def test_health_and_metrics_do_not_fill_it(api: Api, lines: Path) -> None:
    await api.http.get("/health")
    await api.http.get("/metrics")
    assert read(lines) == []


SECRET = "xyzzy-plugh"


class ExplodingEngine(FakeEngine):
    """Fails with what it was given on its lips."""

    def add(self, submit: Any) -> None:
        raise RuntimeError(f"cannot digest {submit.prompt_token_ids}")


async def test_no_prompt_and_no_answer_is_ever_logged(
    store: Path, lines: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 5}),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 5, "stream": True}),
        ("/v1/completions", {"prompt": [SECRET, {"a": SECRET}]}),
        ("/v1/completions", {"prompt": SECRET, "temperature": SECRET}),
        ("/v1/completions", {"prompt": SECRET, "stop": [SECRET, 5]}),
        ("/v1/completions", {"prompt": SECRET * 100}),
        ("/v1/completions", {"prompt": SECRET + "\ud800"}),
        ("/v1/completions", {"prompt": SECRET, "model": SECRET}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": SECRET}]}),
        ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": [{"type": SECRET}]}]}),
        ("/tokenize", {"prompt": SECRET}),
        ("/detokenize", {"tokens": SECRET}),
    ]
    async with api_of(store, FakeEngine(saying(store, SECRET * 3))) as api:
        for path, body in requests:
            answer = await api.post(path, **body)
            assert answer.status_code in (200, 400, 404), answer.text
        await api.http.post("/v1/completions", content=b'{"prompt": "%s' % SECRET.encode(), headers={"a": "b"})
    async with api_of(store, ExplodingEngine()) as api:
        assert (await api.completion(prompt=SECRET, max_tokens=5)).status_code == 500
    written = lines.read_text() + caplog.text + "".join(capfd.readouterr())
    assert len(lines.read_text().splitlines()) == len(requests) + 2
    assert NAME not in lines.read_text()
    assert SECRET not in written


async def test_validation_errors_do_not_echo_what_they_were_given(api: Api) -> None:
    for body in (
        {"prompt": {"a": SECRET}},
        {"prompt": "a", "temperature": SECRET},
        {"prompt": "a", "stop": [SECRET, 1]},
    ):
        assert SECRET not in (await api.completion(**body)).text
    chat = await api.post("/v1/chat/completions", messages=[{"role": "user", "content": [{"type": SECRET}]}])
    assert SECRET not in chat.text


async def test_a_long_model_name_is_not_repeated_in_full(api: Api) -> None:
    assert len((await api.completion(model="m" * 10_000)).text) < 500
