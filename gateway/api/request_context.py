"""The outermost layer: ``x-request-id``, the log and the metrics of every request, and a plain 500 for exceptions."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import errors
from gateway.api.request_record import RequestRecord

log = logging.getLogger(__name__)

_SANE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """ASGI middleware. A client's own ``x-request-id`` is kept where it is printable and of at most 128 characters.

    With `answer` false the header is left to a proxy in front. `ended` gets the record of each request.
    """

    def __init__(
        self, app: ASGIApp, answer: bool = True, ended: Callable[[RequestRecord], None] = lambda record: None
    ) -> None:
        self._app = app
        self._answer = answer
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(id=_request_id(scope), method=scope["method"])
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(record.headers)
                if self._answer:
                    headers["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.error("request %s failed with %s", record.id, errors.trace(error))
            record.error = "internal_error"
            if record.status:
                raise ConnectionAbortedError from None  # the server hangs up: half an answer must not look whole
            await errors.internal().response()(scope, receive, send_with_id)
        finally:
            record.duration_s = time.perf_counter() - record.started
            record.route = getattr(scope.get("route"), "path", None)
            self._ended(record)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
