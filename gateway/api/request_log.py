"""The log of requests: one JSON object a line, with counts and durations, never with a prompt or an answer."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gateway.api.request_record import RequestRecord

log = logging.getLogger("evermoe.requests")

_QUIET = {"/health", "/metrics"}
"""Asked for every few seconds: logged only where they fail."""


def write(record: RequestRecord) -> None:
    """Log a request that has ended."""
    if log.isEnabledFor(logging.INFO) and not (record.route in _QUIET and record.status == 200):
        log.info("%s", line(record))


def line(record: RequestRecord) -> str:
    """The request as a line; what is unknown or zero is left out."""
    fields: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.id,
        "method": record.method,
        "route": record.route,
        "status": record.status or 499,
        "duration_s": round(record.duration_s, 6),
        "key": record.key,
        "error": record.error,
        "stream": record.stream or None,
        "prompt_tokens": record.prompt_tokens or None,
        "cached_tokens": record.cached_tokens or None,
        "completion_tokens": record.completion_tokens or None,
        "first_token_s": None if record.first_token_s is None else round(record.first_token_s, 6),
        "queue_s": round(record.queue_s, 6) or None,
        "prefill_s": round(record.prefill_s, 6) or None,
        "decode_s": round(record.decode_s, 6) or None,
        "finish_reasons": dict(record.finish_reasons) or None,
    }
    return msgspec.json.encode({name: value for name, value in fields.items() if value is not None}).decode()


def start(file: Path | None) -> None:
    """Write this process's log of requests to `file`, or to standard output.

    A file that is rotated away is opened anew. Raise OSError where it can't be written.
    """
    handler = logging.StreamHandler(sys.stdout) if file is None else logging.handlers.WatchedFileHandler(file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
