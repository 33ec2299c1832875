"""``POST /v1/chat/completions``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gateway.api.serving import CONTEXT, NAME, TEXT, Api, api_of, error_of, events_of, make_store, tokenizer_of

pytestmark = pytest.mark.anyio

PROMPT = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


async def test_the_answer_is_an_assistants_message(api: Api) -> None:
    answer = (await api.chat()).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_the_conversation_goes_through_the_models_template(api: Api, store: Path) -> None:
    answer = await api.chat()
    ids = tokenizer_of(store).encode(PROMPT, add_special_tokens=False).ids
    assert api.engine.submitted[0].prompt_token_ids == ids
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)


async def test_the_first_chunk_has_the_role_and_no_later_one(api: Api) -> None:
    chunks = events_of(await api.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_the_concatenated_stream_is_the_same_text(api: Api) -> None:
    chunks = events_of(await api.chat(stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_every_choice_of_a_stream_has_its_role_and_its_end(api: Api) -> None:
    chunks = events_of(await api.chat(stream=True, n=3))
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "role" in mine[0]["delta"]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


async def test_include_usage_ends_the_stream_with_it(api: Api) -> None:
    usage = (await api.chat()).json()["usage"]
    chunks = events_of(await api.chat(stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_the_answer_may_fill_the_context_where_nothing_is_said(api: Api) -> None:
    usage = (await api.chat(ignore_eos=True)).json()["usage"]
    assert usage["total_tokens"] == CONTEXT


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_max_tokens_count(api: Api, name: str) -> None:
    answer = (await api.chat(**{name: 4})).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_newer_name_wins(api: Api) -> None:
    assert (await api.chat(max_tokens=9, max_completion_tokens=4)).json()["usage"]["completion_tokens"] == 4


async def test_text_parts_are_one_message(api: Api, store: Path) -> None:
    await api.chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    text = tokenizer_of(store).decode(api.engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert text == PROMPT.replace("hi", "a\nb")


@pytest.mark.parametrize(
    "content", [5, [{"type": "image_url", "image_url": {"url": "data:"}}], [{"type": "text"}], ["hi"]]
)
async def test_other_content_is_refused(api: Api, content: Any) -> None:
    error = error_of(await api.chat(content), 400)
    assert error["param"] == "messages[0].content"
    assert "parts of type `text`" in error["message"]


async def test_what_the_template_refuses_is_the_clients_error(api: Api) -> None:
    messages = [{"role": "tool", "content": "5"}]
    error = error_of(await api.post("/v1/chat/completions", model=NAME, messages=messages), 400)
    assert error["param"] == "messages"
    assert "no tool turns here" in error["message"]


async def test_a_generation_prompt_can_be_left_out(api: Api, store: Path) -> None:
    await api.chat(add_generation_prompt=False)
    text = tokenizer_of(store).decode(api.engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert text == PROMPT.removesuffix("<|start|>assistant\n")


async def test_template_variables_reach_the_template(tmp_path: Path) -> None:
    template = "{{ 'thinking' if enable_thinking else 'not' }} {{ reasoning_effort }} {{ eos_token }}"
    store = make_store(tmp_path, template=template)
    async with api_of(store) as api:
        await api.chat(chat_template_kwargs={"enable_thinking": True}, reasoning_effort="low")
    text = tokenizer_of(store).decode(api.engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert text == "thinking low <|end|>"


async def test_a_variable_the_template_chokes_on_is_the_clients_error(tmp_path: Path) -> None:
    async with api_of(make_store(tmp_path, template="{{ deep | tojson }}{{ 1 // zero }}")) as api:
        assert error_of(await api.chat(chat_template_kwargs={"zero": 0}), 400)["param"] == "messages"
        assert error_of(await api.chat(chat_template_kwargs={"zero": "a"}), 400)["param"] == "messages"


async def test_template_variables_must_not_replace_the_conversation(api: Api) -> None:
    error = error_of(await api.chat(chat_template_kwargs={"messages": []}), 400)
    assert error["param"] == "chat_template_kwargs"


async def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    async with api_of(make_store(tmp_path, template=None)) as api:
        error = error_of(await api.chat(), 400)
        assert error["message"] == f"The model `{NAME}` has no chat template: use /v1/completions."
        assert (await api.completion()).status_code == 200
