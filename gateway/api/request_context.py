"""The outermost layer: every answer carries ``x-request-id``, and exceptions reach the client as a plain 500."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import errors

log = logging.getLogger(__name__)

_SANE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """ASGI middleware. A client's own ``x-request-id`` is kept where it is printable and of at most 128 characters.

    With `answer` false the header is left to a proxy in front.
    """

    def __init__(self, app: ASGIApp, answer: bool = True) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._answer:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise  # the server cuts the connection: half an answer must not look whole
            await errors.internal().response()(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
