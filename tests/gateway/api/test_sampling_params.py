"""What a request says about sampling reaches the engine, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel

from gateway.messages import SamplingParams, Submit
from tests.gateway.api.serving import CONTEXT, NAME, TEXT, Api, api_of, error_of
from tests.gateway.api.test_over_http import openai_client

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def schema_of(params: SamplingParams) -> Any:
    """The schema of a grammar."""
    return json.loads(params.grammar or "")["grammars"][0]["json_schema"]


@pytest.mark.parametrize("ask", ["completion", "chat"])
async def test_every_parameter_arrives(api: Api, ask: str) -> None:
    wishes = {
        "min_p": 0.25, "presence_penalty": 2, "frequency_penalty": -0.5, "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "17": 1.5},
    }  # fmt: skip
    await getattr(api, ask)(**wishes)
    params = api.engine.submitted[0].params
    got = {name: getattr(params, name) for name in wishes}
    assert got == wishes | {"logit_bias": {5: -100.0, 17: 1.5}}


@pytest.mark.parametrize("ask", ["completion", "chat"])
async def test_null_is_the_default(api: Api, ask: str) -> None:
    names = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "response_format")
    await getattr(api, ask)(**dict.fromkeys((*names, "logprobs")))
    await getattr(api, ask)()
    with_nulls, without = (submit.params for submit in api.engine.submitted)
    assert msgspec.structs.replace(with_nulls, seed=0) == msgspec.structs.replace(without, seed=0)


def test_a_plain_request_is_told_in_few_bytes() -> None:
    plain = Submit(request_id="r", prompt_token_ids=[1], params=SamplingParams(max_tokens=5, temperature=0.0, seed=1))
    assert len(msgspec.msgpack.encode(plain)) < 100


async def test_logprobs_are_asked_of_the_prompt_only_to_echo_them(api: Api) -> None:
    for body in ({"logprobs": 3}, {"logprobs": 3, "echo": True}, {"echo": True}):
        await api.completion(**body)
    params = [submit.params for submit in api.engine.submitted]
    assert [(p.logprobs, p.prompt_logprobs) for p in params] == [(3, None), (3, 3), (None, None)]


async def test_a_prompt_can_only_be_scored_as_far_as_a_message_holds(store: Path) -> None:
    async with api_of(store, context_length=100_000) as api:
        body = {"prompt": [5] * 50_000, "echo": True, "max_tokens": 0}
        assert error_of(await api.completion(logprobs=20, **body), 400)["param"] == "logprobs"
        assert len((await api.completion(logprobs=1, **body)).json()["choices"][0]["logprobs"]["tokens"]) == 50_000


async def test_a_length_that_nobody_asked_for_may_be_cut(api: Api) -> None:
    await api.chat()
    await api.chat(max_tokens=5)
    await api.completion(max_tokens=5)
    await api.completion(max_tokens=None)
    assert [submit.cap_max_tokens for submit in api.engine.submitted] == [True, False, False, True]
    assert api.engine.submitted[0].params.max_tokens == CONTEXT - len(api.engine.submitted[0].prompt_token_ids)


async def test_best_of_may_be_what_n_is(api: Api) -> None:
    assert len((await api.completion(n=3, best_of=3)).json()["choices"]) == 3
    assert error_of(await api.completion(n=2, best_of=3), 400)["param"] == "best_of"


class TestResponseFormat:
    @pytest.mark.parametrize("ask", ["completion", "chat"])
    async def test_a_schema_reaches_the_engine(self, api: Api, ask: str) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
        assert (await getattr(api, ask)(response_format=wanted)).status_code == 200
        found = schema_of(api.engine.submitted[0].params)
        assert {name: found[name] for name in SCHEMA} == SCHEMA

    async def test_json_object_is_any_object(self, api: Api) -> None:
        await api.chat(response_format={"type": "json_object"})
        assert schema_of(api.engine.submitted[0].params)["type"] == "object"

    async def test_text_asks_for_nothing(self, api: Api) -> None:
        await api.chat(response_format={"type": "text"})
        assert api.engine.submitted[0].params.grammar is None

    @pytest.mark.parametrize(
        ("schema", "reason"),
        [
            ({"type": 5}, "type must be a string"),
            ({"type": "string", "not": {"const": "a"}}, "Unimplemented keys"),
            ({"type": "string", "pattern": "("}, "regex parse error"),
            ({"$ref": "https://example.com/a.json"}, "not present in a registry"),
            ({"$ref": "#/$defs/none"}, ""),
            ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
        ],
    )
    async def test_what_cannot_be_enforced_is_refused(self, api: Api, schema: dict[str, Any], reason: str) -> None:
        for strict in (None, True):
            wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
            error = error_of(await api.chat(response_format=wanted), 400)
            assert error["param"] == "response_format"
            assert reason in error["message"]
        assert not api.engine.submitted

    async def test_unless_the_client_does_not_mind(self, api: Api) -> None:
        schema = {"type": "array", "uniqueItems": True}
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": False}}
        assert (await api.chat(response_format=wanted)).status_code == 200

    @pytest.mark.parametrize("depth", [100, 300, 400])
    async def test_a_schema_of_any_depth_is_answered(self, api: Api, depth: int) -> None:
        schema: dict[str, Any] = {"type": "object"}
        for _ in range(depth):
            schema = {"properties": {"a": schema}}
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert error_of(await api.chat(response_format=wanted), 400)

    async def test_a_large_one_is_compiled_too(self, api: Api) -> None:
        schema = {"type": "object", "properties": {f"p{i}": {"enum": ["a", i]} for i in range(1000)}}
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert (await api.chat(response_format=wanted)).status_code == 200


class Answer(BaseModel):
    a: int


def test_the_official_client_knows_all_of_it(store: Path) -> None:
    with openai_client(store) as client:
        chat = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hi"}],
            logprobs=True,
            top_logprobs=2,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={"5": 1},
            n=2,
            response_format={"type": "json_object"},
        )
        for choice in chat.choices:
            assert choice.logprobs is not None
            content = choice.logprobs.content or []
            assert bytes(byte for token in content for byte in token.bytes or []).decode() == TEXT
            assert {len(token.top_logprobs) for token in content} == {2}
        stream = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "hi"}], logprobs=True, stream=True
        )
        logprobs = [chunk.choices[0].logprobs for chunk in stream]
        assert sum(len(told.content or []) for told in logprobs if told) == len(content)
        completion = client.completions.create(model=NAME, prompt="def", echo=True, logprobs=1, max_tokens=0)
        told = completion.choices[0].logprobs
        assert told is not None
        assert told.tokens == ["def"]
        assert list(told.token_logprobs or []) == [None]
        with client.chat.completions.stream(
            model=NAME, messages=[{"role": "user", "content": "hi"}], response_format={"type": "json_object"}
        ) as events:
            assert events.get_final_completion().choices[0].message.content == TEXT
