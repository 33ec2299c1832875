"""Server-sent events of OpenAI's completions, as far as a replay needs them. Pure: bytes in, events out."""

from __future__ import annotations

import msgspec

_LONGEST_EVENT = 16 << 20
_DONE = b"[DONE]"


class StreamError(ValueError):
    """A stream that is not as it should be; the message says how."""


class Choice(msgspec.Struct):
    """What came for one answer."""

    text: str | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """Tokens so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ErrorBody(msgspec.Struct):
    """What went wrong, in OpenAI's shape."""

    message: str | None = None


class Event(msgspec.Struct):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: ErrorBody | None = None


_decoder = msgspec.json.Decoder(Event)


class EventReader:
    """Takes a stream's bytes as they come, and gives its events; `done` after ``[DONE]``."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes; raise StreamError for what is none."""
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *blocks, self._rest = data.split(b"\n\n")
        if len(self._rest) > _LONGEST_EVENT:
            raise StreamError(f"an event of more than {_LONGEST_EVENT >> 20} MiB")
        events = []
        for block in blocks:
            payload = _payload(block)
            if payload == _DONE:
                self.done = True
            elif payload:
                events.append(_event(payload))
        return events


def _payload(block: bytes) -> bytes:
    """An event's data; comments and other fields are nobody's business here."""
    if b"\n" not in block and block.startswith(b"data:"):
        return block[5:].strip()
    lines = (line for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line[5:].strip() for line in lines)


def _event(payload: bytes) -> Event:
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise StreamError(f"an event that is none ({error}): {payload[:80]!r}") from None
