"""The golden rule, in one process: the engine's tokens are transformers' `generate` on each prompt alone, in fp32."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gateway import attention
from gateway.batch import build_batch
from gateway.engine import Engine, EngineSettings
from gateway.kv_cache import KVCache
from gateway.messages import SamplingParams
from gateway.row_groups import RowGroup, group_rows
from gateway.scheduler import Work
from gateway.sequence import Sequence
from tests.checkpoints import FAMILIES
from tests.gateway.inline_model import InlineFamily, answer_all, drain, prompts, single_threaded, submit

PROMPTS = prompts(3, 11, 29)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], InlineFamily]:
    """Each family's tiny model, made once."""
    made: dict[str, InlineFamily] = {}

    def of(family: str) -> InlineFamily:
        if family not in made:
            made[family] = InlineFamily(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


FamilyOf = Callable[[str], InlineFamily]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_with_chunked_prompts_beside_decoding(family_of: FamilyOf, family: str) -> None:
    one = family_of(family)
    engine = one.engine(token_budget=7, max_sequences=4)
    assert answer_all(engine, PROMPTS) == [one.generate(prompt, 32) for prompt in PROMPTS]
    assert engine.pool.used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_changes_no_token(family_of: FamilyOf, family: str) -> None:
    one = family_of(family)
    block_bytes = 4 * 4 * sum(shape.numbers for shape in one.model.kv_shapes.values())
    engine = one.engine(token_budget=16, max_sequences=3, kv_cache_gib=17.5 * block_bytes / 2**30)
    assert engine.pool.total == 17  # the three need 30
    assert answer_all(engine, PROMPTS) == [one.generate(prompt, 32) for prompt in PROMPTS]
    assert engine.scheduler.preemptions > 0
    assert engine.pool.used == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_windows_smaller_than_the_prompt_hold_across_chunks(family_of: FamilyOf, family: str) -> None:
    one = family_of(family)
    assert one.model.network.config.sliding_window == 6  # type: ignore[union-attr]
    asked = prompts(70, 41, seed=8)
    answers = answer_all(one.engine(token_budget=9, max_sequences=2), asked)
    assert answers == [one.generate(prompt, 32) for prompt in asked]


@pytest.fixture
def chunk_groups(monkeypatch: pytest.MonkeyPatch) -> list[RowGroup]:
    """Groups of several sequences' chunks, as attention meets them."""
    met: list[RowGroup] = []

    def spy(*args: Any, **kwargs: Any) -> list[RowGroup]:
        groups = group_rows(*args, **kwargs)
        met.extend(group for group in groups if not group.decodes and len(group.blocks) > 1)
        return groups

    monkeypatch.setattr(attention, "group_rows", spy)
    return met


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_equal_chunks_are_attended_together(family_of: FamilyOf, family: str, chunk_groups: list[RowGroup]) -> None:
    one = family_of(family)
    asked = prompts(13, 13, 13, 7, 7, seed=5)
    engine = one.engine(token_budget=64, max_sequences=6)
    assert answer_all(engine, asked) == [one.generate(prompt, 32) for prompt in asked]
    assert [(len(group.blocks), group.count, group.from_start) for group in chunk_groups] == [
        (2, 7, True), (3, 13, True),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_equal_chunks_behind_a_cached_prefix_are_attended_together(
    family_of: FamilyOf, family: str, chunk_groups: list[RowGroup]
) -> None:
    one = family_of(family)
    [prefix] = prompts(12, seed=9)
    asked = [[*prefix, *tail] for tail in prompts(5, 5, 5, seed=10)]
    engine = one.engine(token_budget=64, max_sequences=6)
    answer_all(engine, [[*prefix, 1]])
    answers = answer_all(engine, asked)
    assert answers == [one.generate(prompt, 32) for prompt in asked]
    assert len({tuple(answer) for answer in answers}) == 3
    [group] = chunk_groups
    assert (group.positions[:, 0].tolist(), group.count, group.from_start) == ([12] * 3, 5, False)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_answers_do_not_depend_on_who_comes_and_goes(family_of: FamilyOf, family: str) -> None:
    one = family_of(family)
    engine = one.engine(token_budget=11, max_sequences=4)
    asked = prompts(5, 17, 33, 2, 26, 9, seed=4)
    for number, prompt in enumerate(asked[:3]):
        engine.add(submit(str(number), prompt))
    arriving = [submit(str(number + 3), prompt) for number, prompt in enumerate(asked[3:])]
    steps = 0

    def between() -> None:
        nonlocal steps
        steps += 1
        if steps % 5 == 0 and arriving:
            engine.add(arriving.pop(0))
        if steps == 12:
            engine.cancel("1")

    answers = drain(engine, between)
    for number, prompt in enumerate(asked):
        whole = one.generate(prompt, 32)
        assert answers[str(number)] == (whole[: len(answers["1"])] if number == 1 else whole)
    assert 0 < len(answers["1"]) < 32
    assert engine.pool.used == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.1, "seed": 6, "top_p": 0.9, "top_k": 40}]
)
def test_resubmitted_with_its_tokens_a_request_continues_alike(
    family_of: FamilyOf, family: str, params: dict[str, Any]
) -> None:
    one = family_of(family)
    [whole] = answer_all(one.engine(), [PROMPTS[1]], **params)
    assert len(set(whole)) > 4
    for kept in (1, 13, 31):
        engine = one.engine(token_budget=8, max_sequences=4)
        engine.add(submit("other", PROMPTS[2], temperature=1.0, seed=99))
        engine.add(submit("again", PROMPTS[1], emitted=whole[:kept], **params))
        assert drain(engine)["again"] == whole[kept:]


def test_seeded_text_is_alike_alone_and_in_a_crowd(family_of: FamilyOf) -> None:
    one = family_of("olmoe")
    params: dict[str, Any] = {"temperature": 1.3, "seed": 17, "top_p": 0.95}
    [alone] = answer_all(one.engine(), [PROMPTS[2]], **params)
    engine = one.engine(token_budget=8, max_sequences=5)
    for number, prompt in enumerate(prompts(8, 21, 4, seed=12)):
        engine.add(submit(f"crowd{number}", prompt, temperature=0.8, seed=number))
    engine.add(submit("same", PROMPTS[2], **params))
    assert drain(engine)["same"] == alone
    [other] = answer_all(one.engine(), [PROMPTS[2]], **{**params, "seed": 18})
    assert other != alone


def test_engines_of_two_models_in_one_process_do_not_disturb_each_other(family_of: FamilyOf) -> None:
    families = [family_of("deepseek_v3"), family_of("gpt_oss")]
    engines = [one.engine(token_budget=7, max_sequences=4) for one in families]
    engines.append(Engine(families[0].load(), EngineSettings(kv_cache_gib=0.001, block_size=8)))
    for engine in engines:
        for number, prompt in enumerate(PROMPTS):
            engine.add(submit(str(number), prompt))
    answers: list[dict[str, list[int]]] = [{} for _ in engines]
    while any(engine.has_work for engine in engines):
        for engine, said in zip(engines, answers, strict=True):  # a step of each in turn
            for delta in engine.step():
                said.setdefault(delta.request_id, []).extend(delta.token_ids)
    for one, said in zip([*families, families[0]], answers, strict=True):
        assert [said[str(i)] for i in range(3)] == [one.generate(prompt, 32) for prompt in PROMPTS]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 7.0],
}


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_longrope_goes_by_each_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    scales = {"short_mscale": 1.1, "long_mscale": 1.3} if family == "phimoe" else {}
    own = {"rope_parameters": {**LONGROPE, **scales}, "original_max_position_embeddings": 24, "head_dim": 8}
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES[family], **own})
    one = InlineFamily(family, tmp_path_factory.mktemp("longrope"))
    asked = prompts(3, 20, 24, 25, 40, seed=6)  # some cross 24 tokens while they decode, some start beyond
    # Without a cache transformers computes each token with one set of frequencies for all rows, as longrope is meant.
    expected = [one.generate(prompt, 32, use_cache=False) for prompt in asked]
    assert answer_all(one.engine(token_budget=9, max_sequences=5), asked) == expected
    block_bytes = 4 * 4 * sum(shape.numbers for shape in one.model.kv_shapes.values())
    tight = one.engine(token_budget=9, max_sequences=5, kv_cache_gib=20.5 * block_bytes / 2**30)
    assert answer_all(tight, asked) == expected
    assert tight.scheduler.preemptions > 0


def test_dynamic_rope_goes_by_each_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    monkeypatch.setitem(
        FAMILIES, "qwen3_moe", {**FAMILIES["qwen3_moe"], "rope_parameters": rope, "max_position_embeddings": 32}
    )
    one = InlineFamily("qwen3_moe", tmp_path_factory.mktemp("dynamic"))
    one.model.context_length = 256  # dynamic scaling starts where the trained context ends
    asked = prompts(3, 20, 36, seed=6)
    expected = []
    for prompt in asked:
        one.generate([5], 1)  # transformers' module remembers the longest text it has seen until it sees a short one
        expected.append(one.generate(prompt, 32))
    assert answer_all(one.engine(token_budget=9, max_sequences=3), asked) == expected


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_in_half_precision_logits_are_as_exact_as_transformers(
    tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    one = InlineFamily(family, tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)
    exact = copy.deepcopy(one.reference).float()
    errors, peer_errors = [], []
    for prompt in prompts(40, 40, 40, 40, seed=1):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            truth, peer = exact(ids).logits[0], one.reference(ids).logits[0].float()
        ours = chunked_logits(one, prompt, chunks=[13, 20, *[1] * 7])
        errors.append((ours - truth).abs())
        peer_errors.append((peer - truth).abs())
    assert one.model.dtype == torch.bfloat16
    assert torch.cat(errors).median() < 1.2 * torch.cat(peer_errors).median()


def chunked_logits(one: InlineFamily, prompt: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every row of `prompt`, computed `chunks` tokens at a time."""
    cache = KVCache(one.model.kv_shapes, blocks=20, block_size=4, dtype=one.model.dtype)
    sequence = Sequence("r", SamplingParams(max_tokens=1), prompt, len(prompt), seed=0, blocks=list(range(10)))
    logits = []
    for count in chunks:
        batch = build_batch([Work(sequence, count)], cache)
        every_row = dataclasses.replace(batch, sample_rows=torch.arange(count))
        logits.append(one.model.forward(every_row).float())
        sequence.computed += count
    return torch.cat(logits)


def test_both_ways_of_summing_for_sinks_agree() -> None:
    query, keys, values = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.zeros(1, 1, 5, 7).masked_fill_(torch.ones(5, 7).triu(3).bool(), float("-inf"))
    fused = attention._mix_with_sums(query, keys, values, mask, 0.3)
    opened = attention._mix_by_scores(query, keys, values, mask, 0.3)
    torch.testing.assert_close(fused, opened)


def test_soft_capped_scores_are_refused() -> None:
    row = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="soft-capped"):
        attention.paged_attention(torch.nn.Module(), row, row, row, None, attention_step=None, softcap=30.0)  # type: ignore[arg-type]
