"""Whatever a model with random weights says, it keeps to the grammar it was given."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from experts.store import ExpertStore, prepare
from gateway.api.response_format import _compile
from gateway.engine import Engine, EngineSettings, RequestError
from gateway.grammar import Grammars, GrammarState
from gateway.messages import Delta
from gateway.model import load_model
from gateway.sampler import INVALID, sample
from tests.checkpoints import write_checkpoint
from tests.gateway.inline_model import inline_experts, single_threaded, submit
from tests.gateway.test_penalties import sequence

ROOT = Path(__file__).parents[2]
REAL = ROOT / "deploy/model/evermoe-tiny"
ALPHABET = '{}[]:,"\\ \nabcdefghijklmnopqrstuvwxyz0123456789-+.TZ_'
END = 1
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "a person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6, "minLength": 1},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "one of many": {"enum": ["red", "green", 7, None, {"a": 1}]},
    "a number": {"type": "integer"},
    "a choice": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "number"}, "maxItems": 3}]},
    "a tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "n": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["v", "n"],
                "additionalProperties": False,
            }
        },
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def grammar(schema: dict[str, Any], *, lenient: bool = False) -> str:
    return _compile(json.dumps(schema), lenient)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random weights whose tokenizer has a token for each character that JSON needs, and a few longer."""
    path = tmp_path_factory.mktemp("grammar")
    checkpoint = write_checkpoint("qwen3_moe", path / "checkpoint")
    vocabulary = {"<pad>": 0, "<end>": END}
    for text in [*ALPHABET, '{"', '":', "true", "false", "null", '"name', "  "]:
        vocabulary.setdefault(text.replace(" ", "Ġ").replace("\n", "Ċ"), len(vocabulary))
    for byte in ("Ã", "©", "ð", "Ł", "ĺ"):  # parts of characters
        vocabulary.setdefault(byte, len(vocabulary))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, text in enumerate(["<pad>", "<end>"])
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    prepare(checkpoint, path / "store")
    return path / "store"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    store = ExpertStore.open(folder)
    model = load_model(store, experts=inline_experts(store))
    return Engine(model, EngineSettings(kv_cache_gib=0.01), grammars=Grammars(folder, model.vocab_size))


def run(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def text_of(folder: Path, deltas: list[Delta]) -> str:
    tokens = [token for delta in deltas for token in delta.token_ids]
    decoded: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=True)
    return decoded


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_what_stops_validates(engine: Engine, folder: Path, name: str) -> None:
    """Greedy and drawn, hot and cold, a batch of all at once; and few run on for ever."""
    schema = SCHEMAS[name]
    temperatures = [0.0, *[0.8] * 6, *[1.5] * 5]
    for i, temperature in enumerate(temperatures):
        wishes: dict[str, Any] = {
            "seed": i,
            "temperature": temperature,
            "grammar": grammar(schema),
            "stop_token_ids": (END,),
        }
        engine.add(submit(str(i), [5, 6, 7], max_tokens=120, **wishes))
    answers = run(engine)
    stopped = [deltas for deltas in answers.values() if deltas[-1].finish_reason == "stop"]
    assert len(stopped) >= (1 if name == "any object" else len(temperatures) // 3)
    for deltas in stopped:
        jsonschema.validate(json.loads(text_of(folder, deltas)), schema)
    assert engine.pool.used == 0


def test_it_stops_where_nothing_can_follow_without_waiting_for_an_end_token(engine: Engine, folder: Path) -> None:
    """Not even where end tokens are ignored, or where more tokens were wanted."""
    engine.add(submit("r", [5], max_tokens=200, grammar=grammar({"const": {"a": 1}}), min_tokens=100))
    [deltas] = run(engine).values()
    assert json.loads(text_of(folder, deltas)) == {"a": 1}
    assert (deltas[-1].finish_reason, deltas[-1].stop_token) == ("stop", False)


def test_others_in_the_batch_are_not_touched(engine: Engine) -> None:
    engine.add(submit("alone", [5, 6], temperature=1.0, seed=3))
    [alone] = run(engine).values()
    engine.add(submit("alone", [5, 6], temperature=1.0, seed=3))
    engine.add(submit("other", [5, 6], temperature=1.0, seed=3, grammar=grammar({"type": "object"})))
    beside = run(engine)["alone"]
    assert [delta.token_ids for delta in beside] == [delta.token_ids for delta in alone]


def test_a_sequence_that_moves_goes_on_alike(engine: Engine) -> None:
    wishes: dict[str, Any] = {
        "grammar": grammar(SCHEMAS["a person"]), "temperature": 1.2, "seed": 9, "frequency_penalty": 0.5,
        "repetition_penalty": 1.2, "stop_token_ids": (END,), "max_tokens": 150,
    }  # fmt: skip
    engine.add(submit("r", [5, 6, 7], **wishes))
    whole = [token for delta in run(engine)["r"] for token in delta.token_ids]
    for moved in (1, len(whole) // 2, len(whole) - 1):
        engine.add(submit("r", [5, 6, 7], emitted=whole[:moved], **wishes))
        assert [token for delta in run(engine)["r"] for token in delta.token_ids] == whole[moved:]
    engine.add(submit("r", [5, 6, 7], emitted=whole, **wishes))
    assert [(delta.token_ids, delta.finish_reason) for delta in engine.step()] == [([], "stop")]


def test_a_grammar_that_is_none_is_refused_by_name(engine: Engine) -> None:
    for broken in ("no grammar", json.dumps({"grammars": [{"json_schema": {"type": 5}}]})):
        for take in (engine.prepare, engine.add):
            with pytest.raises(RequestError, match="`response_format` can't be used"):
                take(submit("r", [5], grammar=broken))
    assert not engine.has_work


def test_an_engine_without_grammars_says_so(engine: Engine) -> None:
    bare = Engine(engine.model, EngineSettings(kv_cache_gib=0.001))
    with pytest.raises(RequestError, match="`response_format`"):
        bare.add(submit("r", [5], grammar=grammar({"type": "object"})))


def test_a_grammar_that_outgrows_its_limits_ends_its_own_request_only(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = llguidance.LLParserLimits(step_lexer_fuel=10, verbose_errors=False)
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **_: tight)
    picky = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": "^(a|b)*c{3,40}$"} for i in range(9)},
    }
    engine._grammars, kept = Grammars(folder, engine.model.vocab_size), engine._grammars
    engine.add(submit("picky", [5], grammar=grammar(picky)))
    engine.add(submit("other", [5]))
    ended: dict[str, str | None] = {}
    while engine.has_work:
        ended |= {delta.request_id: delta.error for delta in engine.step() if delta.finish_reason}
    engine._grammars = kept
    assert ended["other"] is None
    assert str(ended["picky"]).startswith("The text could not be kept to its `response_format` (")
    assert engine.pool.used == 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(REAL / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(REAL, 4096)


class TestMasks:
    def test_whitespace_comes_to_an_end(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        """A space, or a new line and its indentation: a model can't go on with it for ever."""
        much = "{\n" + " " * 25
        for text, fine in (('{ "', True), ('{\n    "', True), ("{  ", False), ("{\n\n", False), (much, False)):
            state = grammars.start(grammar({"type": "object"}), 0)
            state.catch_up([tokenizer.token_to_id(c.replace(" ", "Ġ").replace("\n", "Ċ")) or 0 for c in text])
            assert (state.failure is None) == fine, text

    def test_only_what_the_grammar_allows_is_chosen(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        state = grammars.start(grammar({"enum": ["yes", "no"]}), 0)
        allowed = np.nonzero(state.allowed(4096))[0]
        assert {tokenizer.decode([int(token)]) for token in allowed} <= {'"', '"y', '"n', '"no', '"yes', '"ye'}
        said: list[int] = []
        for text in ('"', "n", "o", '"'):
            assert not state.complete
            said.append(tokenizer.token_to_id(text) or 0)
            state.catch_up(said)
        assert state.complete

    def test_a_vocabulary_with_room_to_spare_is_masked_there_too(self) -> None:
        state = Grammars(REAL, 5000).start(grammar({"type": "object"}), 0)
        assert not state.allowed(5000)[4096:].any()

    def test_masked_rows_choose_among_what_is_allowed(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        logits = torch.zeros(3, 4096)
        logits[:, 77] = 50.0
        batch = [sequence([1], [], **wish) for wish in ({}, {"temperature": 1.0}, {"logit_bias": {88: 90.0}})]
        batch[1].sampling.keep_to(grammars.start(grammar({"const": True}), 1))
        first, masked, last = sample(logits, batch)
        assert (first, last) == (77, 88)
        assert "true".startswith(tokenizer.decode([masked]))
        logits[1] = float("-inf")
        assert sample(logits, batch)[1] == INVALID

    def test_a_second_request_finds_its_grammar_compiled(
        self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = grammar({"const": "twice"})
        grammars.start(text, 0)
        monkeypatch.setattr(grammars, "_compile", None)
        assert isinstance(grammars.start(text, 0), GrammarState)

    def test_a_compiled_one_does_not_wait_for_another_to_be_compiled(
        self, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready = grammar({"const": "ready"})
        grammars.start(ready, 0)
        compiling, go_on = threading.Event(), threading.Event()
        compile_slowly = grammars._compile

        def slow(text: str) -> Any:
            compiling.set()
            assert go_on.wait(20)
            return compile_slowly(text)

        monkeypatch.setattr(grammars, "_compile", slow)
        thread = threading.Thread(target=grammars.start, args=(grammar({"const": "slow"}), 0))
        thread.start()
        assert compiling.wait(20)
        grammars.start(ready, 0)
        go_on.set()
        thread.join()

    def test_a_tokenizer_without_bytes_is_told_apart(self, tmp_path: Path) -> None:
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(REAL / name, tmp_path)
        words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
        with pytest.raises(RequestError, match="not possible with this model's tokenizer"):
            Grammars(tmp_path, 4096).start(grammar({"type": "object"}), 0)
