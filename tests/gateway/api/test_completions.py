"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.api.serving import CONTEXT, TEXT, Api, api_of, events_of, saying, tokenizer_of
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


def answer_tokens(store: Path) -> int:
    """Tokens of TEXT and the one that ends it."""
    return len(tokenizer_of(store).encode(TEXT).ids) + 1


async def test_the_answer_is_the_models_text_with_its_usage(api: Api, store: Path) -> None:
    answer = (await api.completion(prompt="def")).json()
    tokens = answer_tokens(store)
    prompt = len(tokenizer_of(store).encode("def").ids)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_concatenated_stream_is_the_same_text(api: Api) -> None:
    chunks = events_of(await api.completion(stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert len(chunks) > 10
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_a_stream_has_one_finish_reason_and_no_half_character(api: Api) -> None:
    chunks = events_of(await api.completion(stream=True))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)


async def test_max_tokens_ends_the_answer_with_length(api: Api) -> None:
    answer = (await api.completion(max_tokens=5)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert TEXT.startswith(answer["choices"][0]["text"])


async def test_max_tokens_is_16_where_nothing_is_said(api: Api) -> None:
    assert (await api.completion(max_tokens=None)).json()["usage"]["completion_tokens"] == 16


async def test_the_default_of_max_tokens_gives_way_to_the_context(api: Api) -> None:
    answer = await api.completion(prompt=[5] * (CONTEXT - 3), max_tokens=None)
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("max_tokens", [1, 7, 30, 60])
async def test_stream_and_answer_agree_wherever_the_text_is_cut(api: Api, max_tokens: int) -> None:
    whole = (await api.completion(max_tokens=max_tokens)).json()["choices"][0]
    chunks = events_of(await api.completion(max_tokens=max_tokens, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


class TestPrompts:
    async def test_token_ids_go_to_the_engine_as_they_are(self, api: Api) -> None:
        assert (await api.completion(prompt=[7, 8, 9])).json()["usage"]["prompt_tokens"] == 3
        assert api.engine.submitted[0].prompt_token_ids == [7, 8, 9]

    async def test_a_text_is_tokenized(self, api: Api, store: Path) -> None:
        await api.completion(prompt="return a")
        assert api.engine.submitted[0].prompt_token_ids == tokenizer_of(store).encode("return a").ids

    @pytest.mark.parametrize("prompt", [["def", "return"], [[1, 2], [3]]])
    async def test_a_list_of_prompts_has_a_choice_for_each(self, api: Api, prompt: list[Any]) -> None:
        answer = (await api.completion(prompt=prompt)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert {choice["text"] for choice in answer["choices"]} == {TEXT}

    async def test_prompts_times_n_choices_stand_in_order_and_the_prompt_counts_once(self, store: Path) -> None:
        replies = {1: saying(store, "one"), 2: saying(store, "two")}
        engine = FakeEngine(lambda prompt, position: replies[prompt[0]](prompt, position))
        async with api_of(store, engine) as api:
            answer = (await api.completion(prompt=[[1], [2]], n=2)).json()
            assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
            assert answer["usage"]["prompt_tokens"] == 2

    async def test_choices_of_a_stream_are_whole_each_with_one_finish_reason(self, api: Api) -> None:
        chunks = events_of(await api.completion(prompt=["def", "return"], n=2, stream=True))
        texts, reasons = [""] * 4, [0] * 4
        for chunk in chunks:
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] += choice["finish_reason"] is not None
        assert texts == [TEXT] * 4
        assert reasons == [1] * 4

    async def test_a_long_text_is_tokenized_too(self, store: Path) -> None:
        async with api_of(store, context_length=100_000) as api:
            prompt = "def add " * 2000
            await api.completion(prompt=prompt)
            assert api.engine.submitted[0].prompt_token_ids == tokenizer_of(store).encode(prompt).ids


class TestSampling:
    async def test_parameters_reach_the_engine(self, api: Api) -> None:
        await api.completion(temperature=0.5, top_p=0.9, top_k=7, seed=11, min_tokens=3, stop_token_ids=[5])
        params = api.engine.submitted[0].params
        assert (params.temperature, params.top_p, params.top_k, params.seed, params.min_tokens) == (0.5, 0.9, 7, 11, 3)
        assert params.max_tokens == 60

    async def test_what_is_left_out_is_openais_default(self, api: Api) -> None:
        await api.completion(temperature=None, top_k=-1)
        params = api.engine.submitted[0].params
        assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)

    async def test_a_seed_that_is_left_out_is_drawn_here(self, api: Api) -> None:
        """Not by the gateway: a sequence that moves to another one must go on alike."""
        for _ in range(2):
            await api.completion()
        first, second = (submit.params.seed for submit in api.engine.submitted)
        assert first is not None
        assert first != second

    async def test_the_models_generation_config_comes_before_that(self, store: Path, tmp_path: Path) -> None:
        for file in store.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 4]}')
        async with api_of(tmp_path) as api:
            await api.completion()
            await api.completion(temperature=0, top_k=0)
        first, second = (submit.params for submit in api.engine.submitted)
        assert (first.temperature, first.top_k, first.stop_token_ids) == (0.6, 20, (1, 4))
        assert (second.temperature, second.top_k) == (0.0, 0)

    async def test_the_answers_of_n_have_seeds_of_their_own_that_follow_from_the_one_given(self, api: Api) -> None:
        await api.completion(seed=2**63 - 1, n=3)
        assert [submit.params.seed for submit in api.engine.submitted] == [2**63 - 1, -(2**63), -(2**63) + 1]

    async def test_stop_token_ids_end_the_text_before_them(self, api: Api, store: Path) -> None:
        ids = tokenizer_of(store).encode(TEXT).ids
        answer = (await api.completion(stop_token_ids=[ids[4]])).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == tokenizer_of(store).decode(ids[:4])
        assert answer["usage"]["completion_tokens"] == 5

    async def test_ignore_eos_goes_on_to_max_tokens(self, api: Api) -> None:
        answer = (await api.completion(ignore_eos=True)).json()
        assert answer["usage"]["completion_tokens"] == 60
        assert answer["choices"][0] == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}

    async def test_special_tokens_show_where_they_are_asked_for(self, api: Api) -> None:
        answer = (await api.completion(ignore_eos=True, max_tokens=60, skip_special_tokens=False)).json()
        assert answer["choices"][0]["text"].startswith(TEXT + "<|end|><|end|>")


class TestStopStrings:
    @pytest.mark.parametrize("stop", ["return", ["nothing", "return"], ["\n    ret"]])
    async def test_the_text_ends_before_the_stop_string(self, api: Api, stop: Any) -> None:
        answer = (await api.completion(stop=stop)).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        first = stop if isinstance(stop, str) else stop[-1]
        assert answer["choices"][0]["text"] == TEXT[: TEXT.index(first)]

    @pytest.mark.parametrize("stop", ["return", "a + b  # n", "🙂", "語 d", "done"])
    async def test_no_part_of_it_leaks_into_a_stream(self, api: Api, stop: str) -> None:
        chunks = events_of(await api.completion(stop=stop, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT[: TEXT.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    async def test_what_only_began_like_one_is_given_in_the_end(self, api: Api) -> None:
        chunks = events_of(await api.completion(stop="done!", stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT

    async def test_the_engine_stops_working_on_it(self, store: Path) -> None:
        async with api_of(store, context_length=10**9) as api:
            await api.completion(stop="def", ignore_eos=True, max_tokens=10**8)
            await asyncio.to_thread(api.engine.wait_until, lambda: api.engine.cancelled == 1)
            assert not api.engine.running

    async def test_min_tokens_come_before_any_stop_string(self, api: Api) -> None:
        answer = (await api.completion(stop=" a", min_tokens=20)).json()
        text = answer["choices"][0]["text"]
        assert text == TEXT
        assert answer["usage"]["completion_tokens"] > 20

    async def test_null_stops_nothing(self, api: Api) -> None:
        assert (await api.completion(stop=None)).json()["choices"][0]["text"] == TEXT


class TestUsageInStreams:
    async def test_there_is_none_unless_asked_for(self, api: Api) -> None:
        assert not any("usage" in chunk for chunk in events_of(await api.completion(stream=True)))

    async def test_include_usage_adds_a_last_chunk_without_choices(self, api: Api) -> None:
        usage = (await api.completion()).json()["usage"]
        chunks = events_of(await api.completion(stream=True, stream_options={"include_usage": True}))
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == usage
        assert all(chunk["usage"] is None for chunk in chunks[:-1])

    async def test_continuous_usage_stats_grow_with_the_text(self, api: Api) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events_of(await api.completion(stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1]


class TestCachedTokens:
    async def test_are_told_as_a_detail_of_the_prompt(self, api: Api) -> None:
        api.engine.cached_tokens = 2
        usage = (await api.completion(prompt=[7, 8, 9])).json()["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (3, {"cached_tokens": 2})
        chunks = events_of(await api.completion(prompt=[7, 8, 9], stream=True, stream_options={"include_usage": True}))
        assert chunks[-1]["usage"] == usage

    async def test_count_once_for_each_prompt(self, api: Api) -> None:
        api.engine.cached_tokens = 2
        usage = (await api.completion(prompt=[[7, 8, 9], [4, 5, 6]], n=3)).json()["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (6, {"cached_tokens": 4})
