"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gateway.api.serving import CONTEXT, END, NAME, Api, error_of, tokenizer_of

pytestmark = pytest.mark.anyio


async def test_a_prompt_becomes_the_tokens_the_model_would_get(api: Api, store: Path) -> None:
    answer = (await api.post("/tokenize", model=NAME, prompt="def add")).json()
    ids = tokenizer_of(store).encode("def add").ids
    assert answer == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}


async def test_tokens_are_spelled_out_on_request(api: Api, store: Path) -> None:
    answer = (await api.post("/tokenize", prompt="def add", return_token_strs=True)).json()
    assert answer["token_strs"] == tokenizer_of(store).encode("def add").tokens


async def test_a_conversation_is_rendered_first(api: Api) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = (await api.post("/tokenize", messages=messages)).json()
    text = (await api.post("/detokenize", tokens=answer["tokens"])).json()["prompt"]
    assert text == f"<|start|>user\nhi{END}\n<|start|>assistant\n"
    open_ended = (await api.post("/tokenize", messages=messages, add_generation_prompt=False)).json()
    assert open_ended["count"] < answer["count"]


@pytest.mark.parametrize("text", ["", "naïve 🙂 日本語", "<|start|>x"])
async def test_there_and_back(api: Api, text: str) -> None:
    tokens = (await api.post("/tokenize", prompt=text)).json()["tokens"]
    assert (await api.post("/detokenize", model=NAME, tokens=tokens)).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(api: Api, path: str, body: dict[str, object], param: str) -> None:
    assert error_of(await api.post(path, **body), 400)["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
async def test_another_model_is_404(api: Api, path: str, body: dict[str, object]) -> None:
    assert error_of(await api.post(path, model="gpt-5", **body), 404)["code"] == "model_not_found"
