"""Over real HTTP: the official client, clients that vanish, and what an api process must not import."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from tests.gateway.api.serving import CONTEXT, NAME, TEXT, http_server, saying
from tests.gateway.fake_engine import FakeEngine


@contextmanager
def openai_client(store: Path, engine: FakeEngine | None = None) -> Iterator[openai.OpenAI]:
    with (
        http_server(store, engine or FakeEngine(saying(store, TEXT))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


class TestOfficialClient:
    def test_it_completes_and_chats_and_lists_models(self, store: Path) -> None:
        with openai_client(store) as client:
            completion = client.completions.create(model=NAME, prompt="def", max_tokens=60)
            assert completion.choices[0].text == TEXT
            chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hi"}])
            assert chat.choices[0].message.content == TEXT
            assert chat._request_id
            assert [model.id for model in client.models.list()] == [NAME]
            assert client.models.retrieve(NAME).id == NAME

    def test_it_streams_both(self, store: Path) -> None:
        with openai_client(store) as client:
            stream = client.completions.create(model=NAME, prompt="def", max_tokens=60, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
            chat = client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(chat)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens > 20

    def test_it_knows_our_errors_as_its_own(self, store: Path) -> None:
        with openai_client(store) as client:
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.completions.create(model="gpt-5", prompt="def")
            with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
                client.completions.create(model=NAME, prompt=[5] * CONTEXT, stream=True)
            assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


ENDLESS = 10**9


def request(url: str, **body: object) -> socket.socket:
    """A connection on which a completion was asked for, endless unless `body` says otherwise."""
    address = urlsplit(url)
    assert address.hostname
    connection = socket.create_connection((address.hostname, address.port or 80))
    content = json.dumps({"prompt": [5], "ignore_eos": True, "max_tokens": ENDLESS, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


class TestVanishingClients:
    @pytest.mark.parametrize("n", [1, 3])
    def test_one_that_leaves_in_mid_stream_frees_its_sequences(self, store: Path, n: int) -> None:
        engine = FakeEngine(saying(store, TEXT), paced=True)
        with http_server(store, engine, context_length=2 * ENDLESS) as url:
            connection = request(url, stream=True, n=n)
            engine.wait_until(lambda: engine.has_work)
            engine.allow(5)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
            connection.close()
            engine.stop_pacing()
            engine.wait_until(lambda: engine.cancelled == n)
            assert not engine.running

    @pytest.mark.parametrize("stream", [True, False])
    def test_one_that_leaves_before_the_first_token_does_too(self, store: Path, stream: bool) -> None:
        engine = FakeEngine(saying(store, TEXT), paced=True)
        with http_server(store, engine, context_length=2 * ENDLESS) as url:
            connection = request(url, stream=stream)
            engine.wait_until(lambda: engine.has_work)
            connection.close()
            engine.stop_pacing()
            engine.wait_until(lambda: engine.cancelled == 1)
            assert not engine.running

    def test_others_go_on(self, store: Path) -> None:
        engine = FakeEngine(saying(store, TEXT), paced=True)
        with http_server(store, engine, context_length=2 * ENDLESS) as url:
            leaves, stays = request(url, stream=True), request(url, stream=True, max_tokens=60)
            engine.wait_until(lambda: engine.has_work)
            engine.allow(3)
            leaves.close()
            engine.stop_pacing()
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += stays.recv(65536)
            stays.close()
            assert b"data: [DONE]" in answer


def test_an_api_process_imports_neither_torch_nor_transformers(store: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gateway.api.app import create_app\n"
        "from gateway.api.served_model import ApiConfig\n"
        "from gateway.link import GatewayPool\n"
        f"create_app(ApiConfig(store=Path({str(store)!r}), model_name='m'), GatewayPool(None, b'', ''), None)\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'numpy') if name in sys.modules])\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
