"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}`` and nothing else."""

from __future__ import annotations

import json
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gateway.api.request_record import RequestRecord

_NO_OBJECT = "The request body must be a JSON object, sent with `Content-Type: application/json`."


_KINDS = {429: "rate_limit_error"}


class ApiError(Exception):
    """An error the client is told; the message is one or two sentences."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON, in ASCII: what a client sent may hold what UTF-8 cannot."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The error as an answer of its own."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the parameter at fault."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str = "No gateway is available at the moment. The request can be sent again.") -> ApiError:
    """A 503: the same request may succeed in a moment."""
    return ApiError(503, message, code="gateway_unavailable", headers={"Retry-After": "1"})


def from_gateway(status: int, message: str | None, retry_after_s: float | None = None) -> ApiError:
    """What a gateway said of a sequence it gave up."""
    message = message or "The gateway gave this request up."
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return ApiError(
            status, message, code="overloaded", headers={"Retry-After": str(max(1, math.ceil(retry_after_s or 0)))}
        )
    if (
        status == HTTPStatus.GATEWAY_TIMEOUT
    ):  # the same deadline would be missed again: clients must not try by themselves
        return ApiError(status, message, code="deadline_exceeded", headers={"x-should-retry": "false"})
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return unavailable(message)
    return ApiError(status, message)


def internal() -> ApiError:
    """A 500 that gives nothing away; the log has the rest."""
    return ApiError(500, "The server failed to answer this request. It can be sent again.", code="internal_error")


def trace(error: BaseException) -> str:
    """Where a failure happened, for the log, but not in which words: its message may quote a prompt."""
    return f"{type(error).__name__} at\n{''.join(traceback.format_tb(error.__traceback__))}"


def install(app: FastAPI) -> None:
    """Make every error of `app` an OpenAI error; exceptions beyond these are for `RequestContext`."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(request, error)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(request, from_validation(error.errors()))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"Unknown request URL: {request.method} {path}. Ours begin with /v1/."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"Not allowed method {request.method} for {path}."
    else:
        message = str(error.detail)
    return _respond(request, ApiError(error.status_code, message, headers=error.headers))


def _respond(request: Request, error: ApiError) -> Response:
    RequestRecord.of(request.scope).error = error.code
    return error.response()


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's `errors` as a 400."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return ApiError(400, f"The request body is not valid JSON: {reason}, at character {first['loc'][-1]}.")
    place, *location = first["loc"]
    param = _param(location) if place == "body" else str(location[-1])
    if param is None:
        return ApiError(400, _NO_OBJECT)
    if first["type"] == "missing":
        return invalid(param, f"`{param}` is required.", "missing_required_parameter")
    reason = re.sub("^Value error, ", "", first["msg"])
    return invalid(param, f"`{param}` is not valid: {reason[0].lower()}{reason[1:]}.", "invalid_value")


def _param(location: Sequence[str | int]) -> str | None:
    """``messages[0].content`` for ("messages", 0, "content"); what else pydantic adds (union branches) is left out."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part):
            name += f".{part}" if name else part
        else:
            break
    return name or None
