"""Log-probabilities in both shapes, with echo, and in step with the text wherever it is cut or held back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.api.scored_text import ScoredText
from gateway.api.text import ScoredToken, SequenceText
from gateway.api.token_bytes import TokenBytes
from gateway.api.tokenizer import Tokenizer
from gateway.messages import Delta
from tests.gateway.api.serving import TEXT, Api, error_of, events_of, tokenizer_of
from tests.gateway.fake_engine import scores

pytestmark = pytest.mark.anyio

PROMPT = "return a"


@pytest.fixture(scope="module")
def tokens(store: Path) -> tuple[Tokenizer, TokenBytes]:
    tokenizer = Tokenizer.load(store)
    return tokenizer, TokenBytes(tokenizer)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream of one choice as one answer."""
    out: dict[str, Any] = {"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in chunks:
        [choice] = chunk["choices"]
        out["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            out[name] += values
    return out


def as_bytes(tokens: list[str]) -> bytes:
    """The bytes of tokens as completions write them."""
    parts = [t.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1") if "bytes:" in t
             else t.encode() for t in tokens]  # fmt: skip
    return b"".join(parts)


class TestCompletions:
    async def test_each_token_has_its_text_offset_logprob_and_alternatives(self, api: Api, store: Path) -> None:
        choice = (await api.completion(logprobs=2, max_tokens=4)).json()["choices"][0]
        ids = tokenizer_of(store).encode(TEXT).ids[:4]
        told = choice["logprobs"]
        assert told["tokens"] == [tokenizer_of(store).decode([token]) for token in ids]
        assert told["token_logprobs"] == pytest.approx([-token / 1000 for token in ids])
        assert told["text_offset"] == [sum(map(len, told["tokens"][:i])) for i in range(4)]
        for token, text, top in zip(ids, told["tokens"], told["top_logprobs"], strict=True):
            likeliest = {tokenizer_of(store).decode([10]): -0.5, tokenizer_of(store).decode([11]): -1.5}
            assert top == pytest.approx(likeliest | {text: -token / 1000})

    async def test_none_are_told_unless_asked_for(self, api: Api) -> None:
        assert (await api.completion()).json()["choices"][0]["logprobs"] is None
        assert api.engine.submitted[0].params.logprobs is None

    async def test_0_tells_of_the_chosen_tokens_alone(self, api: Api) -> None:
        told = (await api.completion(logprobs=0, max_tokens=3)).json()["choices"][0]["logprobs"]
        assert [list(top) for top in told["top_logprobs"]] == [[token] for token in told["tokens"]]

    async def test_the_tokens_together_are_the_text_and_the_end_is_none_of_them(self, api: Api) -> None:
        choice = (await api.completion(logprobs=1)).json()["choices"][0]
        assert choice["text"] == TEXT
        assert as_bytes(choice["logprobs"]["tokens"]) == TEXT.encode()
        assert any(token.startswith("bytes:\\x") for token in choice["logprobs"]["tokens"])

    @pytest.mark.parametrize("stop", [None, "return", "a + b  # n", "🙂", "日", "done!"])
    @pytest.mark.parametrize("echo", [False, True])
    async def test_a_stream_says_the_same(self, api: Api, stop: str | None, echo: bool) -> None:
        body: dict[str, Any] = {"prompt": PROMPT, "logprobs": 2, "stop": stop, "echo": echo}
        whole = (await api.completion(**body)).json()["choices"][0]
        chunks = events_of(await api.completion(**body, stream=True))
        assert joined(chunks) == {"text": whole["text"], **whole["logprobs"]}

    @pytest.mark.parametrize("stop", ["return", "a + b  # n", "🙂", "日", "def"])
    async def test_no_token_runs_ahead_of_a_streams_text(self, api: Api, stop: str) -> None:
        chunks = events_of(await api.completion(logprobs=0, stop=stop, stream=True))
        for at in range(len(chunks)):
            said = joined(chunks[: at + 1])
            tokens, text = as_bytes(said["tokens"]), said["text"].encode()
            if at < len(chunks) - 1:
                assert text.startswith(tokens)
            else:  # the last token may have begun the stop string
                assert tokens.startswith(text)
                assert all(offset < len(said["text"]) for offset in said["text_offset"])

    async def test_minus_infinity_is_a_number_json_has(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.gateway.fake_engine.scores", lambda tokens, best: scores([10**10], 0))
        told = (await api.completion(logprobs=0, max_tokens=1)).json()["choices"][0]["logprobs"]
        assert told["token_logprobs"] == [-9999.0]


class TestEcho:
    async def test_the_prompt_comes_first(self, api: Api) -> None:
        assert (await api.completion(prompt=PROMPT, echo=True)).json()["choices"][0]["text"] == PROMPT + TEXT
        chunks = events_of(await api.completion(prompt=PROMPT, echo=True, stream=True))
        assert joined(chunks)["text"] == PROMPT + TEXT

    async def test_token_ids_are_echoed_as_text(self, api: Api, store: Path) -> None:
        ids = tokenizer_of(store).encode(PROMPT).ids
        answer = (await api.completion(prompt=[ids, ids], echo=True, n=2, max_tokens=2)).json()
        assert len(answer["choices"]) == 4
        assert all(choice["text"].startswith(PROMPT) for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 8

    async def test_its_tokens_have_logprobs_but_the_first(self, api: Api, store: Path) -> None:
        choice = (await api.completion(prompt=PROMPT, echo=True, logprobs=1, max_tokens=2)).json()["choices"][0]
        told, ids = choice["logprobs"], tokenizer_of(store).encode(PROMPT).ids
        assert "".join(told["tokens"]) == choice["text"]
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx([-token / 1000 for token in ids[1:]])
        assert told["text_offset"] == [sum(map(len, told["tokens"][:i])) for i in range(len(ids) + 2)]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_max_tokens_0_scores_the_prompt_and_says_nothing_more(self, api: Api, stream: bool) -> None:
        response = await api.completion(prompt=PROMPT, echo=True, logprobs=1, max_tokens=0, stream=stream)
        answer = events_of(response)[0] if stream else response.json()
        [choice] = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        assert "".join(choice["logprobs"]["tokens"]) == PROMPT
        if not stream:
            assert answer["usage"]["completion_tokens"] == 0

    async def test_max_tokens_0_is_for_echo_alone(self, api: Api) -> None:
        assert error_of(await api.completion(max_tokens=0), 400)["param"] == "max_tokens"
        assert (await api.completion(max_tokens=0, echo=True)).json()["choices"][0]["text"] == "def"


class TestChat:
    async def test_the_content_is_told_token_by_token(self, api: Api) -> None:
        answer = (await api.chat(logprobs=True, top_logprobs=3)).json()["choices"][0]
        content = answer["logprobs"]["content"]
        assert answer["logprobs"]["refusal"] is None
        assert bytes(byte for token in content for byte in token["bytes"]) == TEXT.encode()
        for token in content:
            assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
            assert [other["logprob"] for other in token["top_logprobs"]] == [-0.5, -1.5, -2.5]
            assert set(token["top_logprobs"][0]) == {"token", "logprob", "bytes"}

    async def test_without_top_logprobs_there_are_no_alternatives(self, api: Api) -> None:
        content = (await api.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
        assert all(token["top_logprobs"] == [] for token in content)

    async def test_a_stream_says_the_same(self, api: Api) -> None:
        whole = (await api.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]
        chunks = events_of(await api.chat(logprobs=True, top_logprobs=1, stream=True))
        parts = [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks]
        assert [token for part in parts for token in part] == whole
        assert len([part for part in parts if part]) > 5

    async def test_top_logprobs_need_logprobs(self, api: Api) -> None:
        for body in ({}, {"logprobs": False}):
            error = error_of(await api.chat(top_logprobs=2, **body), 400)
            assert error["param"] == "top_logprobs"
            assert "`logprobs: true`" in error["message"]

    @pytest.mark.parametrize("wrong", [-1, 21, "5", True])
    async def test_there_are_at_most_20(self, api: Api, wrong: Any) -> None:
        assert error_of(await api.chat(logprobs=True, top_logprobs=wrong), 400)["param"] == "top_logprobs"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text("aé日🙂 <b", max_size=12),
    stops=st.lists(st.text("aé日🙂 b", min_size=1, max_size=3), max_size=2),
    groups=st.lists(st.integers(0, 4), max_size=12),
)
def test_however_tokens_are_grouped_they_stay_in_step(
    tokens: tuple[Tokenizer, TokenBytes], text: str, stops: list[str], groups: list[int]
) -> None:
    tokenizer, known = tokens
    ids = tokenizer.encode(text, special=False)
    scored = ScoredText(SequenceText(tokenizer.decode, stops), start=5)
    said, rest, reason = "", list(ids), None
    given: list[ScoredToken] = []
    for size in [*groups, len(ids)]:
        group, rest = rest[:size], rest[size:]
        end = None if rest else "length"
        piece = scored.push(Delta(request_id="r", token_ids=group, finish_reason=end, logprobs=scores(group, 2)))
        said, reason = said + piece.text, piece.finish_reason
        given += piece.scored
        if reason:
            break
        assert said.encode().startswith(b"".join(known.bytes_of(token.token) for token in given))
    assert [token.token for token in given] == ids[: len(given)]
    assert all(token.logprob == pytest.approx(-token.token / 1000) and len(token.best) == 2 for token in given)
    if reason == "length":
        assert (said, len(given)) == (text, len(ids))
    else:
        assert all(5 <= token.offset < 5 + len(said) for token in given)
