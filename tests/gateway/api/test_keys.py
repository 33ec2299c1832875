"""API keys: where they come from, who gets in, and that they are never shown."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway.api.keys import KeySourceError, load_keys
from placement.policy import KeyPolicy
from tests.gateway.api.serving import Api, api_of, error_of

pytestmark = pytest.mark.anyio

SECRET = "sk-a-long-secret"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


@pytest.fixture
async def closed(store: Path) -> AsyncIterator[Api]:
    """An api that asks for keys."""
    keys = load_keys([KeyPolicy(name="first", sha256="0" * 64), KeyPolicy(name="ours", sha256=DIGEST)])
    async with api_of(store, keys=keys) as api:
        yield api


class TestSources:
    def test_a_digest_a_variable_and_a_file_give_the_same_key(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OUR_KEY", SECRET)
        (tmp_path / "key").write_text(f"{SECRET}\n")
        keys = load_keys(
            [
                KeyPolicy(name="a", sha256=DIGEST),
                KeyPolicy(name="b", env="OUR_KEY"),
                KeyPolicy(name="c", file=tmp_path / "key"),
            ]
        )
        assert {key.digest.hex() for key in keys} == {DIGEST}
        assert SECRET not in repr(keys)

    def test_one_that_is_not_there_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OUR_KEY", raising=False)
        with pytest.raises(KeySourceError, match="'a' is not in the environment variable OUR_KEY: set it"):
            load_keys([KeyPolicy(name="a", env="OUR_KEY")])
        with pytest.raises(KeySourceError, match=r"'b' is not in .*nowhere: write it there \(No such file"):
            load_keys([KeyPolicy(name="b", file=tmp_path / "nowhere")])


class TestAuthorization:
    async def test_without_keys_everybody_gets_in(self, api: Api) -> None:
        assert (await api.completion()).status_code == 200

    async def test_a_key_gets_in(self, closed: Api) -> None:
        closed.http.headers["authorization"] = f"Bearer {SECRET}"
        assert (await closed.completion()).status_code == 200
        assert (await closed.http.get("/v1/models")).status_code == 200

    @pytest.mark.parametrize(
        "header", [None, "", "Bearer", "Bearer ", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer naïve"]
    )
    async def test_nothing_else_does(self, closed: Api, header: str | None) -> None:
        if header is not None:
            closed.http.headers = httpx.Headers([(b"authorization", header.encode())])
        for answer in (await closed.completion(), await closed.http.get("/v1/models"), await closed.post("/tokenize")):
            error = error_of(answer, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert SECRET not in answer.text
        assert not closed.engine.submitted

    @pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/evermoe/status", "/openapi.json"])
    async def test_what_operators_ask_for_stays_open(self, closed: Api, path: str) -> None:
        assert (await closed.http.get(path)).status_code == 200

    async def test_the_openapi_document_says_which_routes_need_one(self, closed: Api) -> None:
        document = (await closed.http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        guarded = {path for path, methods in document["paths"].items() if "security" in next(iter(methods.values()))}
        assert guarded == {
            "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize",
        }  # fmt: skip
