"""The OpenAPI document tells the truth: what FastAPI adds of its own and we never answer is taken out."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.api.gate import GUARDED
from gateway.api.responses import ErrorBody

_MEANINGS = {
    400: "The request is not valid; `param` names what is wrong.",
    401: "The API key is missing or unknown.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The key's limits are reached, or the server's queue is full; see Retry-After.",
    500: "The server failed.",
    503: "No gateway is available, or the server is shutting down; see Retry-After.",
    504: "The request's deadline has passed.",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors a route answers with, for FastAPI's ``responses``."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


def describe(app: FastAPI, *, keys: bool) -> None:
    """Replace the document of `app`; with `keys` it says which routes need one."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _true(get_openapi(title=app.title, version=app.version, routes=app.routes), keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _true(document: dict[str, Any], keys: bool) -> dict[str, Any]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's own: ours are 400
            if keys and path.startswith(GUARDED):
                operation["security"] = [{"key": []}]
    schemas = document.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
