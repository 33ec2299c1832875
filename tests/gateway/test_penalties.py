"""Penalties, bias and early stops against their definitions, token by token."""

from collections import Counter
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.logit_edits import edit
from gateway.messages import SamplingParams
from gateway.sampler import sample
from gateway.sequence import Sequence

VOCABULARY = 12


def sequence(prompt: list[int], generated: list[int], **params: Any) -> Sequence:
    return Sequence(
        request_id="r",
        params=SamplingParams(**{"max_tokens": 1000, "temperature": 0.0, **params}),
        tokens=prompt + generated,
        prompt_length=len(prompt),
        seed=0,
    )


def reference(logits: list[float], one: Sequence) -> list[float]:
    """The definitions: OpenAI's of bias, presence and frequency, CTRL's of repetition."""
    params, generated = one.params, Counter(one.tokens[one.prompt_length :])
    out = []
    for token, logit in enumerate(logits):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if token in one.tokens:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * generated[token] + params.presence_penalty * (token in generated)
        stops = token in params.stop_token_ids and len(one.tokens) - one.prompt_length < params.min_tokens
        out.append(float("-inf") if stops else logit)
    return out


def edited(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    needs = 0
    for one in sequences:
        needs |= one.sampling.needs
    out = logits.clone()
    edit(out, sequences, needs)
    return out


tokens = st.integers(0, VOCABULARY - 1)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.sampled_from([-1.5, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.75, 0.25, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.25, 2.0]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 3.5, 100.0])),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(tokens, max_size=3, unique=True).map(tuple),
    },
)
sequences = st.builds(
    lambda prompt, generated, wished: sequence(prompt, generated, **wished),
    st.lists(tokens, min_size=1, max_size=20),
    st.lists(tokens, max_size=20),
    wishes,
)


@given(batch=st.lists(sequences, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_batch_of_anything_follows_the_definitions(batch: list[Sequence], seed: int) -> None:
    logits = torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    expected = torch.tensor([reference(row, one) for row, one in zip(logits.tolist(), batch, strict=True)])
    torch.testing.assert_close(edited(logits, batch), expected)
    assert sample(logits, batch) == expected.argmax(-1).tolist()


@given(
    prompt=st.lists(tokens, min_size=1, max_size=10),
    said=st.lists(tokens, min_size=1, max_size=200),
    moved=st.integers(0, 199),
    wished=wishes,
)
def test_counting_step_by_step_or_after_a_move_is_the_same(
    prompt: list[int], said: list[int], moved: int, wished: dict[str, Any]
) -> None:
    grown = sequence(prompt, [], **wished)
    logits = torch.linspace(-3, 3, VOCABULARY)[None]
    for token in said:
        edited(logits, [grown])
        grown.tokens.append(token)
    elsewhere = sequence(prompt, said[:moved], **wished)
    edited(logits, [elsewhere])
    elsewhere.tokens += said[moved:]
    expected = torch.tensor([reference(logits[0].tolist(), grown)])
    torch.testing.assert_close(edited(logits, [grown]), expected)
    torch.testing.assert_close(edited(logits, [elsewhere]), expected)


def test_many_distinct_tokens_are_counted() -> None:
    logits = torch.zeros(1, 1000)
    one = sequence(list(range(300)), list(range(200, 700)) * 2, frequency_penalty=1.0, repetition_penalty=2.0)
    out = edited(logits, [one])[0]
    assert out.tolist() == [0.0] * 200 + [-2.0] * 500 + [0.0] * 300


def test_the_callers_logits_are_left_alone() -> None:
    logits = torch.zeros(1, VOCABULARY)
    sample(logits, [sequence([1], [2, 2], frequency_penalty=1.0, logit_bias={3: 5.0})])
    assert not logits.any()


def test_stopping_stays_possible_where_nothing_else_is() -> None:
    logits = torch.full((2, VOCABULARY), float("-inf"))
    logits[:, 5] = 1.0
    logits[1, 6] = 0.0
    batch = [sequence([1], [], min_tokens=3, stop_token_ids=(5,)) for _ in range(2)]
    assert sample(logits, batch) == [5, 6]
