"""Malformed requests of many kinds, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Malformed:
    """Bytes to send on a fresh connection."""

    kind: str
    data: bytes
    complete: bool = True
    """False: the request is cut off, and its client hangs up instead of waiting for an answer."""


PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63) - 1, 10**30, "", "a", "\ud800", "\x00",
    "x" * 5000, [], [[]], [None], [1, "a"], ["a", 1], [[1], "a"], [-1], [2**40], {}, {"a": 1}, {"type": "text"},
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{"role": 5, "content": 5}],
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options",
    "min_tokens", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
    "echo", "tools", "tool_choice", "response_format", "ignore_eos", "priority", "user", "tokens", "suffix", "best_of",
    "min_p", "repetition_penalty", "chat_template_kwargs", "add_special_tokens", "return_token_strs",
)  # fmt: skip


def malformed(count: int, seed: int = 0) -> Iterator[Malformed]:
    """`count` requests, every kind as often as the others."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        data, complete = kind(draw)
        yield Malformed(kind.__name__.strip("_"), data, complete)


def _request(body: bytes, path: str = PATHS[0], *, method: str = "POST", length: int | None = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def _body(path: str) -> dict[str, Any]:
    if path.endswith("completions"):
        # Both limits: what is left of the request after its damage must stay small.
        return {"prompt": [5, 6], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1,
                "max_completion_tokens": 1}  # fmt: skip
    return {"prompt": "hi"} if path == "/tokenize" else {"tokens": [5, 6]}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _garbage(draw: random.Random) -> tuple[bytes, bool]:
    return draw.randbytes(draw.randint(1, 2000)), False


def _garbage_after_a_method(draw: random.Random) -> tuple[bytes, bool]:
    return draw.choice([b"GET ", b"POST /v1/", b"PUT * "]) + draw.randbytes(draw.randint(1, 200)) + b"\r\n\r\n", False


def _head_cut_off(draw: random.Random) -> tuple[bytes, bool]:
    whole = _request(b"{}")
    return whole[: draw.randint(1, len(whole) - 7)], False


def _odd_request_line(draw: random.Random) -> tuple[bytes, bool]:
    method = draw.choice(["BREW", "get", "P\x00ST", "CONNECT", "TRACE", "HEAD", "DELETE"])
    path = draw.choice(["/" + "a" * 5000, "/%ff%00", "//..//../etc/passwd", "*", "http://x/", "/v1/completions?a=%zz"])
    version = draw.choice(["1.1", "1.0", "0.9", "2.0", "x"])
    return f"{method} {path} HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n".encode(), False


def _broken_json(draw: random.Random) -> tuple[bytes, bool]:
    path = draw.choice(PATHS)
    body = bytearray(_json(_body(path)))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body))
        match draw.randrange(3):
            case 0:
                body[at] = draw.randrange(256)
            case 1:
                del body[at]
            case _:
                body.insert(at, draw.choice(b'{}[]",:\\\x00\xff0'))
    return _request(bytes(body), path), True


def _json_cut_off(draw: random.Random) -> tuple[bytes, bool]:
    path = draw.choice(PATHS)
    body = _json(_body(path))
    return _request(body[: draw.randrange(len(body))], path), True


def _no_object(draw: random.Random) -> tuple[bytes, bool]:
    body = draw.choice([b"", b"null", b"[]", b"5", b'"a"', b"true", b"NaN", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00"])
    return _request(body, draw.choice(PATHS)), True


def _odd_value(draw: random.Random) -> tuple[bytes, bool]:
    path = draw.choice(PATHS)
    body = _body(path) | {draw.choice(FIELDS): draw.choice(ODD) for _ in range(draw.randint(1, 3))}
    return _request(_json(body), path), True


def _missing_field(draw: random.Random) -> tuple[bytes, bool]:
    path = draw.choice(PATHS)
    return _request(_json({"model": draw.choice(["evermoe-tiny", "gpt-5", ""]), "max_tokens": 1}), path), True


def _odd_number(draw: random.Random) -> tuple[bytes, bool]:
    number = draw.choice([b"1e999", b"-1e999", b"NaN", b"Infinity", b"0x10", b"01", b"1.", b"9" * 5000, b"-"])
    return _request(b'{"prompt": [5], "max_tokens": 1, "temperature": %s}' % number), True


def _nesting(draw: random.Random) -> tuple[bytes, bool]:
    depth = draw.choice([10, 200, 990, 2000, 50_000])
    left, right = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    field = draw.choice(FIELDS).encode()
    return _request(b'{"prompt": [5], "max_tokens": 1, "%s": %s1%s}' % (field, left * depth, right * depth)), True


def _many_of_them(draw: random.Random) -> tuple[bytes, bool]:
    body = _body(PATHS[0])
    count = draw.choice([2049, 5000])
    match draw.randrange(4):
        case 0:
            body["prompt"] = ["a"] * count
        case 1:
            body["prompt"] = [[]] * count
        case 2:
            body["n"] = count
        case _:
            body["stop"] = ["a"] * count
    return _request(_json(body)), True


def _too_long(draw: random.Random) -> tuple[bytes, bool]:
    return _request(_json({"prompt": [5] * draw.choice([2048, 2049, 100_000]), "max_tokens": 1})), True


def _wrong_length(draw: random.Random) -> tuple[bytes, bool]:
    body = _json(_body(PATHS[0]))
    length = draw.choice([0, 1, len(body) - 1, len(body) + 1, 10**6, -1, 10**30])
    return _request(body, length=length), False


def _chunked_and_cut_off(draw: random.Random) -> tuple[bytes, bool]:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = draw.choice(
        [b'5\r\n{"pro', b"zz\r\n", b"-1\r\n", b"ffffffffffffffff\r\na", b'5\r\n{"a":\r\n', b"3\r\n{}\r\n\r\n"]
    )
    return head + chunk, False


def _wrong_place(draw: random.Random) -> tuple[bytes, bool]:
    path = draw.choice(
        ["/v1/nothing", "/", "/v1/embeddings", "/v1/models/x", "/v1/chat/completions/", "/health", "/metrics"]
    )
    method = draw.choice(["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    return _request(_json(_body(PATHS[0])), path, method=method), True


def _wrong_type(draw: random.Random) -> tuple[bytes, bool]:
    kind = draw.choice(
        [b"text/plain", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"", b"\xff"]
    )
    return _request(_json(_body(PATHS[0]))).replace(b"application/json", kind), True


def _odd_headers(draw: random.Random) -> tuple[bytes, bool]:
    header = draw.choice(
        [
            b"Expect: 100-continue",
            b"Upgrade: websocket\r\nConnection: upgrade",
            b"Authorization: " + draw.randbytes(50).hex().encode() * 100,
            b"x-request-timeout: " + draw.choice([b"-1", b"nan", b"soon", b"1e999", b""]),
            b"x-request-id: " + b"i" * 5000,
            b"X-Long: " + b"l" * 70_000,
            b"Content-Encoding: gzip",
            b"Host: b",
        ]
    )
    return _request(_json({"prompt": [5], "temperature": -1})).replace(b"Host: a", b"Host: a\r\n" + header), True


KINDS: tuple[Callable[[random.Random], tuple[bytes, bool]], ...] = (
    _garbage, _garbage_after_a_method, _head_cut_off, _odd_request_line, _broken_json, _json_cut_off, _no_object,
    _odd_value, _missing_field, _odd_number, _nesting, _many_of_them, _too_long, _wrong_length, _chunked_and_cut_off,
    _wrong_place, _wrong_type, _odd_headers,
)  # fmt: skip
