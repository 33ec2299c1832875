"""The light tokenizer is transformers' own in all that counts: ids, text, and rendered conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

import deploy
from experts.errors import StoreError
from gateway.api.chat_template import ChatTemplate, TemplateError
from gateway.api.served_model import ApiConfig, ServedModel
from gateway.api.tokenizer import Tokenizer
from tests.gateway.api.serving import END, TEMPLATE, TEXT, make_store

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "hi <b>", "name": None},
    {"role": "assistant", "content": "yes"},
]


def configured(folder: Path, **settings: Any) -> Path:
    """A store with more in its tokenizer_config.json."""
    make_store(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **settings}))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bos_token": "<|start|>", "add_bos_token": True},
        {"bos_token": "<s>", "add_bos_token": True},
        {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": False, "rstrip": False}},
        {"additional_special_tokens": ["<|tool|>"]},
        {
            "added_tokens_decoder": {
                "320": {"content": "<one>", "lstrip": False, "rstrip": False, "normalized": False, "special": False},
                "321": {"content": "<two>", "lstrip": False, "rstrip": False, "normalized": False, "special": True},
            }
        },
    ],
)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    configured(tmp_path, **settings)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = f"{TEXT} <one><two> <|tool|> <pad> <s> {END}"
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.encode(text, special=special) == ids
        assert ours.decode(ids, skip_special=special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% for m in messages %}\n  {{ m['content'] | tojson }}{{ m.name is defined }}\n{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{% endfor %}{{ x }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ {'a': 1, 'b': ['é']} | tojson(indent=2) }}{{ dict(a=1) }}",
        "{{ strftime_now('%Y') | length }}",
        "{%- macro turn(m) %}[{{ m.role | upper }}]{% endmacro -%}{{ messages | map(attribute='role') | join(',') }}",
    ],
)
@pytest.mark.parametrize("generation", [True, False])
def test_conversations_look_as_transformers_renders_them(tmp_path: Path, template: str, generation: bool) -> None:
    configured(tmp_path, bos_token="<|start|>")
    (tmp_path / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.chat is not None
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
    assert ours.chat.render(CHAT, add_generation_prompt=generation) == rendered


def test_the_default_model_speaks_as_with_transformers() -> None:
    folder = Path(deploy.__path__[0]) / "model" / "evermoe-tiny"
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    text = f"{TEXT} <|im_start|>\n\n\tmore 1234 <|endoftext|>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.chat is not None
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.chat.render(CHAT) == rendered
    assert ours.encode(rendered, special=False) == theirs.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_dict=False
    )


class TestTemplates:
    def test_one_in_tokenizer_config_counts_where_there_is_no_file(self, tmp_path: Path) -> None:
        configured(tmp_path, chat_template="old {{ messages[0].content }}")
        (tmp_path / "chat_template.jinja").unlink()
        chat = Tokenizer.load(tmp_path).chat
        assert chat is not None
        assert chat.render(CHAT) == "old hi <b>"

    def test_of_several_the_default_one_counts(self, tmp_path: Path) -> None:
        several = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
        configured(tmp_path, chat_template=several)
        (tmp_path / "chat_template.jinja").unlink()
        chat = Tokenizer.load(tmp_path).chat
        assert chat is not None
        assert chat.render(CHAT) == "plain"

    @pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
    def test_a_template_is_sandboxed(self, attack: str) -> None:
        with pytest.raises(TemplateError):
            ChatTemplate(attack, {}).render(CHAT)

    def test_a_broken_one_is_an_error_of_the_store(self, tmp_path: Path) -> None:
        make_store(tmp_path, template="{% for %}")
        with pytest.raises(StoreError, match="chat template is broken"):
            Tokenizer.load(tmp_path)


class TestStores:
    def test_without_a_tokenizer_json_transformers_converts_what_is_there(self, tmp_path: Path) -> None:
        make_store(tmp_path)
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        backend.model.save(str(tmp_path))
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END, "unk_token": END})
        )
        ours = Tokenizer.load(tmp_path)
        assert ours.decode(ours.encode("def add(a, b):")) == "def add(a, b):"
        assert ours.encode("return a + b") == theirs("return a + b")["input_ids"]
        assert ours.chat is not None

    def test_no_tokenizer_at_all_is_one_line_with_a_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 8, "vocab_size": 8}')
        with pytest.raises(StoreError, match=r"no tokenizer\.json.* prepare it again$") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
    def test_a_broken_file_is_named(self, tmp_path: Path, name: str) -> None:
        make_store(tmp_path)
        (tmp_path / name).write_text('{"a": ')
        with pytest.raises(StoreError, match=name):
            ServedModel.load(ApiConfig(store=tmp_path, model_name="m"))

    def test_a_configuration_without_a_context_length_is_refused(self, tmp_path: Path) -> None:
        make_store(tmp_path)
        (tmp_path / "config.json").write_text('{"vocab_size": 320}')
        with pytest.raises(StoreError, match="max_position_embeddings"):
            ServedModel.load(ApiConfig(store=tmp_path, model_name="m"))
        assert ServedModel.load(ApiConfig(store=tmp_path, model_name="m", context_length=9)).context_length == 9

    @pytest.mark.parametrize(
        ("generation", "config", "eos"),
        [
            ('{"eos_token_id": 7}', {}, (7,)),
            ('{"eos_token_id": [7, 8]}', {}, (7, 8)),
            ("{}", {"eos_token_id": 9}, (9,)),
            ("{}", {"text_config": {"eos_token_id": [9, 4]}}, (9, 4)),
            ("{}", {}, (1,)),
        ],
    )
    def test_what_ends_an_answer_is_found(
        self, tmp_path: Path, generation: str, config: dict[str, Any], eos: tuple[int, ...]
    ) -> None:
        make_store(tmp_path)
        (tmp_path / "generation_config.json").write_text(generation)
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320, "max_position_embeddings": 8, **config}))
        assert ServedModel.load(ApiConfig(store=tmp_path, model_name="m")).eos_token_ids == eos

    def test_truncation_saved_in_a_tokenizer_does_not_cut_prompts(self, tmp_path: Path) -> None:
        make_store(tmp_path)
        backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.enable_truncation(4)
        backend.enable_padding(length=9)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.load(tmp_path).encode("a a a a a a") == [0] * 6
