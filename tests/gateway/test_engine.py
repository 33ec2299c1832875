"""The engine's manners: what it refuses, what it says when, and that one request's trouble stays its own."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from experts.store import ExpertStore
from gateway.batch import Batch
from gateway.engine import Engine, EngineSettings, RequestError
from gateway.messages import Delta, SamplingParams, Submit, Timings
from gateway.model import ModelError, load_model
from tests.gateway.inline_model import (
    InlineFamily,
    answer_all,
    drain,
    failures,
    inline_experts,
    prompts,
    single_threaded,
    submit,
)

PROMPT = prompts(9)[0]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> InlineFamily:
    return InlineFamily("qwen3_moe", tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(family: InlineFamily) -> Engine:
    return family.engine(token_budget=16, max_sequences=4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": []}, "The prompt is empty"),
        ({"prompt": [1, 128]}, "The prompt has token id 128; the vocabulary is 0 to 127"),
        ({"prompt": [-1]}, "token id -1"),
        ({"emitted": [4, 999]}, "The emitted text has token id 999"),
        ({"stop_token_ids": (3, 500)}, "stop_token_ids has token id 500"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"logit_bias": {128: 1.0}}, "logit_bias has token id 128"),
        ({"logit_bias": {1: float("-inf")}}, "it must be finite numbers"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_requests_that_can_never_run_are_refused(engine: Engine, changes: dict[str, Any], sentence: str) -> None:
    prompt = changes.pop("prompt", PROMPT)
    with pytest.raises(RequestError, match=re.escape(sentence)):
        engine.add(submit("r", prompt, **changes))
    assert not engine.has_work


def test_too_long_a_request_is_refused_in_the_words_clients_match(engine: Engine) -> None:
    engine.add(submit("fits", [5] * 240, max_tokens=16))
    with pytest.raises(RequestError) as refused:
        engine.add(submit("r", [5] * 240, max_tokens=17))
    assert str(refused.value) == (
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens "
        "(240 in the messages, 17 in the completion). Please reduce the length of the messages or completion."
    )


def test_a_request_larger_than_the_cache_is_refused(family: InlineFamily) -> None:
    block_bytes = 4 * 4 * sum(shape.numbers for shape in family.model.kv_shapes.values())
    engine = family.engine(kv_cache_gib=3.5 * block_bytes / 2**30)
    with pytest.raises(RequestError, match=r"does not fit a cache of 12 tokens; raise gateway\.kv_cache_gib"):
        engine.add(submit("r", PROMPT, max_tokens=5))
    assert answer_all(engine, [PROMPT], max_tokens=4) == [family.generate(PROMPT, 4)]


def test_an_answer_that_may_be_as_long_as_fits_is_cut_to_the_cache(family: InlineFamily) -> None:
    block_bytes = 4 * 4 * sum(shape.numbers for shape in family.model.kv_shapes.values())
    engine = family.engine(kv_cache_gib=3.5 * block_bytes / 2**30)  # 12 tokens; the last one is never computed
    for emitted in ([], family.generate(PROMPT, 2)):
        request = submit("r", PROMPT, max_tokens=200, emitted=emitted)
        engine.add(msgspec.structs.replace(request, cap_max_tokens=True))
        *_, last = deltas = [delta for _ in range(4 - len(emitted)) for delta in engine.step()]
        assert [*emitted, *(token for delta in deltas for token in delta.token_ids)] == family.generate(PROMPT, 4)
        assert last.finish_reason == "length"
    assert engine.pool.used == 0
    with pytest.raises(RequestError, match="does not fit a cache of 12 tokens"):
        engine.add(msgspec.structs.replace(submit("r", [5] * 13, max_tokens=9), cap_max_tokens=True))


def test_a_name_is_taken_until_its_request_ends(engine: Engine) -> None:
    engine.add(submit("r", PROMPT))
    with pytest.raises(RequestError, match="Request r is already running"):
        engine.add(submit("r", PROMPT))
    drain(engine)
    engine.add(submit("r", PROMPT))
    assert len(drain(engine)["r"]) == 32


def test_each_step_says_what_it_added(engine: Engine, family: InlineFamily) -> None:
    whole = family.generate(PROMPT, 3)
    engine.add(submit("r", PROMPT, max_tokens=3))
    *deltas, last = [delta for _ in range(3) for delta in engine.step()]
    assert deltas == [Delta(request_id="r", token_ids=[whole[0]]), Delta(request_id="r", token_ids=[whole[1]])]
    assert last == Delta(request_id="r", token_ids=[whole[2]], finish_reason="length", timings=last.timings)
    assert not engine.has_work
    assert engine.step() == []


def test_a_prompt_in_chunks_says_nothing_before_its_end(engine: Engine) -> None:
    engine.add(submit("r", [5] * 40, max_tokens=1))
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]


def test_a_stop_token_ends_the_text_and_is_marked(engine: Engine, family: InlineFamily) -> None:
    whole = family.generate(PROMPT, 32)
    stop = next(token for token in whole[4:] if token not in whole[:4])
    length = whole.index(stop) + 1
    engine.add(submit("r", PROMPT, stop_token_ids=(stop,)))
    deltas = [delta for _ in range(length) for delta in engine.step()]
    assert [token for delta in deltas for token in delta.token_ids] == whole[:length]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token) == ("stop", True)
    assert not any(delta.stop_token or delta.finish_reason for delta in deltas[:-1])
    assert not engine.has_work
    assert engine.pool.used == 0


def test_min_tokens_puts_the_stop_off(engine: Engine, family: InlineFamily) -> None:
    stop = family.generate(PROMPT, 1)[0]
    [text] = answer_all(engine, [PROMPT], stop_token_ids=(stop,), min_tokens=6, max_tokens=20)
    assert stop not in text[:6]


def test_a_request_with_everything_at_once_moves_and_goes_on_alike(engine: Engine) -> None:
    wishes: dict[str, Any] = {
        "temperature": 1.1, "top_p": 0.9, "min_p": 0.02, "seed": 4, "presence_penalty": 0.7, "frequency_penalty": 0.4,
        "repetition_penalty": 1.2, "logit_bias": {5: 2.0}, "min_tokens": 9, "stop_token_ids": (7, 8), "max_tokens": 24,
    }  # fmt: skip
    [whole] = answer_all(engine, [PROMPT], **wishes)
    for moved in range(1, len(whole)):
        engine.add(submit("moved", PROMPT, emitted=whole[:moved], **wishes))
        engine.add(submit("other", PROMPT[:4], temperature=1.0))
        assert drain(engine)["moved"] == whole[moved:]


def scores_of(family: InlineFamily, tokens: list[int]) -> torch.Tensor:
    """transformers' log-probabilities [tokens - 1, vocabulary] of what follows each token."""
    with torch.no_grad():
        logits: torch.Tensor = family.reference(torch.tensor([tokens])).logits
    return logits[0, :-1].log_softmax(-1)


def test_tokens_and_prompts_are_scored_as_transformers_scores_them(family: InlineFamily) -> None:
    """In chunks, in a batch, and preempted on the way."""
    block_bytes = 4 * 4 * sum(shape.numbers for shape in family.model.kv_shapes.values())
    engine = family.engine(kv_cache_gib=20.5 * block_bytes / 2**30, token_budget=16, max_sequences=4)
    asked = prompts(30, 1, 17, 2)
    for name, prompt in enumerate(asked):
        wishes: dict[str, Any] = {"logprobs": name, "prompt_logprobs": name, "frequency_penalty": 1.0}
        engine.add(submit(str(name), prompt, max_tokens=20, **wishes if name != 2 else {}))
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
    assert engine.scheduler.preemptions
    for name, prompt in enumerate(asked):
        mine = [delta for delta in deltas if delta.request_id == str(name)]
        told = [delta.prompt_logprobs for delta in mine if delta.prompt_logprobs is not None]
        if name == 2:
            assert not told
            assert not any(delta.logprobs for delta in mine)
            continue
        assert told == [mine[0].prompt_logprobs]
        rows = told[0].rows() + [row for delta in mine if delta.logprobs for row in delta.logprobs.rows()]
        tokens = prompt + [token for delta in mine for token in delta.token_ids]
        reference = scores_of(family, tokens)
        assert len(rows) == len(reference)
        for (own, best), scores, token in zip(rows, reference, tokens[1:], strict=True):
            assert own == pytest.approx(float(scores[token]), abs=2e-4)
            top = scores.topk(name) if name else None
            assert [value for _, value in best] == pytest.approx(top.values.tolist() if top else [], abs=2e-4)


def test_a_moved_request_is_not_told_its_prompt_again(engine: Engine) -> None:
    engine.add(submit("r", PROMPT, emitted=[5], prompt_logprobs=1, logprobs=1))
    [first] = engine.step()
    assert first.prompt_logprobs is None
    assert first.logprobs is not None


def test_gauges_tell_who_runs_and_waits_and_return_to_zero(engine: Engine) -> None:
    for name in "abcdef":
        engine.add(submit(name, PROMPT[:3], max_tokens=4))
    assert (engine.running, engine.waiting, engine.pool.used) == (0, 6, 0)
    engine.step()
    assert (engine.running, engine.waiting, engine.pool.used) == (4, 2, 4)
    drain(engine)
    assert (engine.running, engine.waiting, engine.pool.used) == (0, 0, 0)


def test_cancel_frees_everything_at_any_moment(engine: Engine, family: InlineFamily) -> None:
    for name in "abcdef":
        engine.add(submit(name, PROMPT))
    started = engine.step()
    assert [delta.request_id for delta in started] == ["a"]  # of 16 tokens, 9 are the first prompt
    used = engine.pool.used
    for name in ("b", "f", "unknown", "b"):
        engine.cancel(name)
    assert engine.pool.used < used
    answers = drain(engine)
    whole = family.generate(PROMPT, 32)
    assert answers == {"a": whole[1:], "c": whole, "d": whole, "e": whole}
    assert engine.pool.used == 0


def test_a_request_that_was_finished_elsewhere_only_gets_its_end(engine: Engine) -> None:
    engine.add(submit("length", PROMPT, max_tokens=3, emitted=[7, 8, 9]))
    engine.add(submit("stop", PROMPT, stop_token_ids=(9,), emitted=[7, 8, 9]))
    assert engine.has_work
    assert engine.step() == [
        Delta(request_id="length", token_ids=[], finish_reason="length"),
        Delta(request_id="stop", token_ids=[], finish_reason="stop"),
    ]
    assert not engine.has_work


def test_emitted_tokens_count_towards_max_tokens(engine: Engine, family: InlineFamily) -> None:
    whole = family.generate(PROMPT, 8)
    engine.add(submit("r", PROMPT, max_tokens=8, emitted=whole[:6]))
    assert drain(engine)["r"] == whole[6:]


def test_requests_without_a_seed_get_one_each(family: InlineFamily) -> None:
    seeds = iter([5, 6, 5])
    engine = Engine(family.model, EngineSettings(kv_cache_gib=0.001), draw_seed=lambda: next(seeds))
    first, second, third = answer_all(engine, [PROMPT] * 3, temperature=1.0)
    assert first == third != second
    [seeded] = answer_all(engine, [PROMPT], temperature=1.0, seed=6)
    assert seeded == second


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed_engine(family: InlineFamily, clock: Clock, **settings: Any) -> Engine:
    return Engine(family.model, EngineSettings(kv_cache_gib=0.001, block_size=4, **settings), clock=clock)


def test_the_last_delta_tells_how_long_the_parts_took(family: InlineFamily) -> None:
    clock = Clock()
    engine = timed_engine(family, clock, token_budget=4, max_sequences=1)
    engine.add(submit("before", PROMPT[:2], max_tokens=1))
    engine.add(submit("r", [5] * 8, max_tokens=3))
    timings = []
    while engine.has_work:
        clock.now += 1
        timings += [delta.timings for delta in engine.step()]
    assert timings == [Timings(queue_s=1), None, None, Timings(queue_s=2, prefill_s=1, decode_s=2)]


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again(family: InlineFamily) -> None:
    engine = family.engine(token_budget=64, max_sequences=4)
    begin = prompts(17, seed=7)[0]
    rows: list[int] = []
    forward = family.model.forward

    def counted(batch: Batch) -> torch.Tensor:
        rows.append(len(batch.token_ids))
        return forward(batch)

    asked = [begin, [*begin, 3, 4, 5], [*begin[:9], 6, 7], [9, *begin]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.model, "forward", counted)
        for number, prompt in enumerate(asked):
            engine.add(submit(str(number), prompt, max_tokens=4))
            first, *rest = [delta for _ in range(4) for delta in engine.step()]
            assert first.cached_tokens == (0, 16, 8, 0)[number]
            assert [first.token_ids[0], *(delta.token_ids[0] for delta in rest)] == family.generate(prompt, 4)
            assert not any(delta.cached_tokens for delta in rest)
    assert rows == [17, 1, 1, 1, 4, 1, 1, 1, 3, 1, 1, 1, 18, 1, 1, 1]
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (66, 24)
    assert (engine.pool.used, engine.pool.cached > 0) == (0, True)


def test_prefix_caching_can_be_switched_off(family: InlineFamily) -> None:
    engine = family.engine(prefix_caching=False)
    assert answer_all(engine, [PROMPT]) == answer_all(engine, [PROMPT])
    assert (engine.scheduler.prefix_queries, engine.pool.cached) == (0, 0)


def test_a_full_queue_refuses_with_the_time_it_will_take(family: InlineFamily) -> None:
    clock = Clock()
    engine = timed_engine(family, clock, max_sequences=2, max_waiting=2, token_budget=16)
    for name in "abcd":
        engine.add(submit(name, PROMPT, max_tokens=2))
    engine.add(submit("refused", PROMPT))
    engine.add(submit("moved", PROMPT, emitted=[7], max_tokens=3))  # its client has half an answer: let in
    refused, *_ = engine.step()
    assert (refused.request_id, refused.finish_reason, refused.error_status) == ("refused", "error", 429)
    assert refused.error == "The server is busy: 4 requests are waiting, and no more are taken. Please retry later."
    assert refused.retry_after_s == 2.0  # four, two at a time, of a second each as long as nothing is known


def test_the_time_a_queue_takes_goes_by_what_requests_took_lately(family: InlineFamily) -> None:
    clock = Clock()
    engine = timed_engine(family, clock, max_sequences=2, max_waiting=6)
    refusals = []
    for number in range(40):
        for copy in range(9):
            engine.add(submit(f"{number}.{copy}", PROMPT, max_tokens=3))
        while engine.has_work:
            refusals += [delta.retry_after_s for delta in engine.step() if delta.error_status == 429]
            clock.now += 2
    assert refusals[0] == 4.0
    assert refusals[-1] == pytest.approx(8 * 4 / 2, rel=0.02)  # eight wait, two run, for two steps of two seconds


def test_deadlines_end_who_waits_and_who_runs(family: InlineFamily) -> None:
    clock = Clock()
    engine = timed_engine(family, clock, max_sequences=2)
    for name, deadline_s in (("runs", 5.0), ("stays", None), ("waits", 3.0), ("late", -1.0)):
        engine.add(msgspec.structs.replace(submit(name, PROMPT, max_tokens=8), deadline_s=deadline_s))
    ended: dict[str, Delta] = {}
    for _ in range(7):
        ended |= {delta.request_id: delta for delta in engine.step() if delta.finish_reason}
        clock.now += 1
    assert {name: (delta.error, delta.error_status) for name, delta in ended.items()} == {
        "late": ("The request's deadline passed while it waited in the queue.", 504),
        "waits": ("The request's deadline passed while it waited in the queue.", 504),
        "runs": ("The request's deadline passed while it was being answered.", 504),
    }
    assert ended["runs"].timings == Timings(decode_s=5)
    assert ended["waits"].timings == Timings(queue_s=3)
    drain(engine)
    assert (engine.pool.used, engine.running, engine.waiting) == (0, 0, 0)


def test_the_more_urgent_starts_first(family: InlineFamily) -> None:
    engine = family.engine(max_sequences=1)
    for name, priority in (("usual", 0), ("urgent", -1)):
        engine.add(msgspec.structs.replace(submit(name, PROMPT, max_tokens=1), priority=priority))
    assert list(drain(engine)) == ["urgent", "usual"]


class FailingExperts:
    """Experts that break when told to."""

    def __init__(self, store: ExpertStore) -> None:
        self._experts = inline_experts(store)
        self.fault: str | None = None

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if layer == 2 and self.fault == "raise":
            raise ConnectionError("all replicas are gone")
        out = self._experts(layer, hidden, index, weights)
        if self.fault == "nan in the first row":
            out[0] = float("nan")
        return torch.full_like(out, float("nan")) if self.fault == "nan" else out


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_a_failed_step_ends_its_requests_with_one_sentence_and_no_others(family: InlineFamily, fault: str) -> None:
    experts = FailingExperts(family.store)
    model = load_model(family.store, experts=experts)
    block_bytes = 4 * 4 * sum(shape.numbers for shape in model.kv_shapes.values())
    engine = Engine(
        model,
        EngineSettings(kv_cache_gib=24.5 * block_bytes / 2**30, block_size=4, token_budget=64, max_sequences=2),
    )
    longer = prompts(11, seed=5)[0]
    for name, prompt in (("a", longer), ("b", longer), ("c", PROMPT), ("d", longer)):
        engine.add(submit(name, prompt))
    experts.fault = fault
    ended = failures(engine.step())
    assert set(ended) == {"a", "b"}
    assert all(sentence.count(".") == 1 and sentence.endswith(".") for sentence in ended.values())
    experts.fault = None
    # The others get the blocks that the failed ones have left, and, being of unlike length, read slots not yet theirs.
    assert drain(engine) == {"c": family.generate(PROMPT, 32), "d": family.generate(longer, 32)}
    assert engine.pool.used == 0


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_a_failed_step_leaves_nothing_for_others_to_find(family: InlineFamily, fault: str) -> None:
    experts = FailingExperts(family.store)
    engine = Engine(
        load_model(family.store, experts=experts),
        EngineSettings(kv_cache_gib=0.001, block_size=4, token_budget=8, max_sequences=2),
    )
    longer = prompts(27, seed=5)[0]
    engine.add(submit("a", longer))
    assert [engine.step() for _ in range(3)] == [[]] * 3
    experts.fault = fault
    assert set(failures(engine.step())) == {"a"}
    experts.fault = None
    assert answer_all(engine, [longer]) == [family.generate(longer, 32)]
    assert engine.pool.used == 0


def test_whoever_shares_blocks_with_a_failed_request_goes_on(family: InlineFamily) -> None:
    experts = FailingExperts(family.store)
    engine = Engine(
        load_model(family.store, experts=experts),
        EngineSettings(kv_cache_gib=0.001, block_size=4, token_budget=64, max_sequences=4),
    )
    begin = prompts(17, seed=7)[0]
    answer_all(engine, [begin], max_tokens=1)
    asked = {"a": [*begin, 3], "b": [*begin, 8, 9]}
    for name, prompt in asked.items():
        engine.add(submit(name, prompt))
    said = {delta.request_id: delta.token_ids for delta in engine.step()}
    assert engine.pool.used == 4 + 1 + 1  # the beginning once
    experts.fault = "nan in the first row"
    deltas = engine.step()
    experts.fault = None
    (failed,) = failures(deltas)
    (other,) = {"a", "b"} - {failed}
    said[other] += next(delta.token_ids for delta in deltas if delta.request_id == other)
    engine.add(submit("c", asked[failed]))
    rest = drain(engine)
    assert said[other] + rest[other] == family.generate(asked[other], 32)
    assert rest["c"] == family.generate(asked[failed], 32)
    assert engine.pool.used == 0


def test_settings_that_cannot_work_are_refused(family: InlineFamily) -> None:
    with pytest.raises(ValueError, match="token_budget"):
        Engine(family.model, EngineSettings(token_budget=8, max_sequences=9))
    with pytest.raises(ValueError, match="kv_cache_gib"):
        Engine(family.model, EngineSettings(kv_cache_gib=1e-9))


def test_expert_weights_are_never_made(family: InlineFamily) -> None:
    absent = [name for name, p in family.model.network.named_parameters() if p.is_meta]
    assert absent
    assert all(".mlp.experts." in name for name in absent)
    assert {int(name.split(".")[2]) for name in absent} == {0, 2}  # layer 1 is dense


@dataclasses.dataclass(frozen=True)
class ChangedStore:
    """A store with other gateway weights."""

    store: ExpertStore
    weights: dict[str, torch.Tensor]

    @property
    def manifest(self) -> Any:
        return self.store.manifest

    def config(self) -> Any:
        return self.store.config()

    def gateway_weights(self) -> dict[str, torch.Tensor]:
        return self.weights


def test_weights_are_the_stores_own_memory(family: InlineFamily) -> None:
    weights = family.store.gateway_weights()
    model = load_model(ChangedStore(family.store, weights), experts=family.experts)  # type: ignore[arg-type]
    parameters = dict(model.network.named_parameters())
    for name, tensor in weights.items():
        assert parameters[name].data_ptr() == tensor.data_ptr()
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_store_that_does_not_match_the_model_is_refused_by_name(family: InlineFamily) -> None:
    weights = family.store.gateway_weights()
    name = "model.layers.1.self_attn.q_proj.weight"
    less = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ModelError, match=f"lacks {name}"):
        load_model(ChangedStore(family.store, less), experts=family.experts)  # type: ignore[arg-type]
    more = {**weights, "model.extra": torch.zeros(2)}
    with pytest.raises(ModelError, match=r"unknown model\.extra"):
        load_model(ChangedStore(family.store, more), experts=family.experts)  # type: ignore[arg-type]


def test_messages_survive_as_given(engine: Engine) -> None:
    """The engine never changes what it was handed."""
    request = Submit(request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=4), emitted=[5])
    engine.add(request)
    drain(engine)
    assert (request.prompt_token_ids, request.emitted) == ([1, 2, 3], [5])
