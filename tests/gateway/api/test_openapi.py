"""The OpenAPI document tells the truth: requests made up from it get no 5xx and only answers that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.api.app import create_app
from gateway.api.served_model import ApiConfig
from tests.gateway.api.serving import NAME, TEXT, http_server, saying
from tests.gateway.fake_engine import FakeEngine

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def document(store: Path) -> Any:
    """The OpenAPI document of an api that answers on a real socket."""
    with http_server(store, FakeEngine(saying(store, TEXT))) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


WITH_BODY = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
WITHOUT = ("/v1/models", "/v1/models/{name}", "/health", "/version", "/metrics", "/evermoe/status")


def exercise(operation: Any, mode: GenerationMode) -> None:
    """Send requests that are as the document says (positive), or are not (negative), and check the answers."""

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    run()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", WITH_BODY)
def test_no_body_breaks_what_the_document_promises(document: Any, path: str, mode: GenerationMode) -> None:
    exercise(document[path]["POST"], mode)


@pytest.mark.parametrize("path", WITHOUT)
def test_what_is_only_asked_for_answers_as_promised(document: Any, path: str) -> None:
    exercise(document[path]["GET"], GenerationMode.POSITIVE)


def test_no_route_is_left_out(described: dict[str, Any]) -> None:
    assert set(described["paths"]) == {*WITH_BODY, *WITHOUT}


@pytest.fixture
def described(store: Path) -> dict[str, Any]:
    """The document itself."""

    async def nothing() -> Any:
        return {}

    return create_app(ApiConfig(store=store, model_name=NAME), None, nothing).openapi()  # type: ignore[arg-type]


def test_fastapis_own_422_is_nowhere(described: dict[str, Any]) -> None:
    assert "422" not in str(described)
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_every_error_has_openais_shape(described: dict[str, Any]) -> None:
    for methods in described["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status >= "400":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody"), status


def test_generation_lists_every_status_it_can_answer_with(described: dict[str, Any]) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = described["paths"][path]["post"]["responses"]
        assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
