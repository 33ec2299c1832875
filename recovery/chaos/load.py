"""Clients that stream answers, note when each token came, and compare the text with an undisturbed one."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from recovery.chaos.scenario import LoadPlan, ScenarioError

_TIMEOUT_S = 300.0
_BEGINNINGS = (
    "import os\n\ndef main():\n", "class Queue:\n    def put(self, item):\n", "def parse(text):\n    ",
    "for line in lines:\n", "def test_", "try:\n    value = int(", "# Returns the", "with open(path) as file:\n",
)  # fmt: skip


@dataclass
class Answer:
    """One streamed answer; times are monotonic seconds."""

    request: int
    began: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None
    changed: bool = False
    ended: bool = False


class Load:
    """The requests of a plan, asked of the service at `url`; `expected` are their undisturbed answers, where known."""

    def __init__(self, url: str, model: str, plan: LoadPlan, expected: Sequence[str] = ()) -> None:
        self._url = url
        self._plan = plan
        self._bodies = [_body(model, number, plan.max_tokens) for number in range(plan.requests)]
        self.expected = list(expected)
        self._turn = itertools.count()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: list[Answer] = []

    def undisturbed(self) -> None:
        """Ask everything once and remember the answers; raise ScenarioError where one fails."""
        for number in range(len(self.expected), len(self._bodies)):
            answer = self._ask(number)
            if answer.error is not None:
                raise ScenarioError(f"{self._url} fails before anything is broken: {answer.error}")
            self.expected.append(answer.text)

    def __enter__(self) -> Load:
        self._over.clear()
        self._threads = [
            threading.Thread(target=self._run, name=f"client-{number}", daemon=True)
            for number in range(self._plan.streams)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Answers under way are waited for."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            number = next(self._turn) % len(self._bodies)
            answer = self._ask(number)
            answer.changed = answer.error is None and answer.text != self.expected[number]
            self.answers.append(answer)

    def _ask(self, number: int) -> Answer:
        answer = Answer(number, time.monotonic())
        request = urllib.request.Request(
            f"{self._url}/v1/completions", self._bodies[number], {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as stream:
                for chunk in _chunks(stream):
                    if "error" in chunk:
                        answer.error = str(chunk["error"]["message"])
                        break
                    answer.times.append(time.monotonic())
                    answer.text += chunk["choices"][0]["text"]
                    answer.ended |= chunk["choices"][0]["finish_reason"] is not None
        except urllib.error.HTTPError as error:
            answer.error = f"status {error.code}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = str(error) or type(error).__name__
        if answer.error is None and not answer.ended:
            answer.error = "the stream ended without its end"
        return answer


def _chunks(stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in stream:
        data = line.strip().removeprefix(b"data: ")
        if data and data != b"[DONE]":
            yield json.loads(data)


def _body(model: str, number: int, max_tokens: int) -> bytes:
    """Every second request draws its tokens."""
    chosen = {"temperature": 0} if number % 2 == 0 else {"temperature": 0.8, "seed": number}
    prompt = _BEGINNINGS[number % len(_BEGINNINGS)] + " " * (number // len(_BEGINNINGS))
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, **chosen}
    return json.dumps(body).encode()
