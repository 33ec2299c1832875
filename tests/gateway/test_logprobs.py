"""Log-probabilities are the model's own, whatever else a request asks for."""

from typing import Any

import torch

from gateway.logprobs import PromptLogprobs
from gateway.messages import Logprobs
from gateway.sampler import INVALID, tell
from tests.gateway.test_penalties import sequence

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3


def rows_of(logprobs: Logprobs) -> list[tuple[float, list[tuple[int, float]]]]:
    return [(round(own, 4), [(token, round(value, 4)) for token, value in best]) for own, best in logprobs.rows()]


def expected(logits: torch.Tensor, token: int, best: int) -> tuple[float, list[tuple[int, float]]]:
    scores = logits.float().log_softmax(-1).tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:best]
    return round(scores[token], 4), [(i, round(scores[i], 4)) for i in order]


def test_each_sequence_is_told_what_it_asked_for() -> None:
    wishes: list[dict[str, Any]] = [
        {"logprobs": 2, "temperature": 0.3, "frequency_penalty": 1.0, "logit_bias": {3: 100.0}},
        {},
        {"logprobs": 0},
        {"logprobs": 20, "top_k": 1},
        {"logprobs": 1},
    ]
    sequences = [sequence([1], [2], **wish) for wish in wishes]
    told = tell(LOGITS, sequences, [3, 4, 5, 6, INVALID])
    assert {row: rows_of(value) for row, value in told.items()} == {
        0: [expected(LOGITS[0], 3, 2)],
        2: [expected(LOGITS[2], 5, 0)],
        3: [expected(LOGITS[3], 6, 20)],
    }


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    [(_, best)] = tell(LOGITS[:1, :3], [sequence([1], [], logprobs=20)], [0])[0].rows()
    assert sorted(token for token, _ in best) == [0, 1, 2]


def test_half_precision_logits_are_normalised_in_full() -> None:
    logits = LOGITS.bfloat16()
    assert rows_of(tell(logits[:1], [sequence([1], [], logprobs=3)], [7])[0]) == [expected(logits[0], 7, 3)]


def test_a_prompt_is_told_chunk_by_chunk_and_once() -> None:
    tokens = [4, 8, 15, 16, 23, 30]
    prompt = PromptLogprobs(2, len(tokens))
    assert prompt.missing(0, 2) == range(2)
    prompt.add(LOGITS[:2], tokens)
    assert prompt.missing(0, 4) == range(2, 4)  # preempted, and computed again from the start
    prompt.add(LOGITS[2:4], tokens)
    assert prompt.missing(4, 2) == range(4, 5)  # the last row is of the first generated token
    prompt.add(LOGITS[4:5], tokens)
    assert len(prompt.missing(6, 1)) == 0
    assert rows_of(prompt.result()) == [expected(LOGITS[i], tokens[i + 1], 2) for i in range(5)]


def test_a_long_chunk_is_told_whole() -> None:
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(2))
    tokens = [i % 40 for i in range(201)]
    prompt = PromptLogprobs(1, len(tokens))
    prompt.add(logits, tokens)
    assert rows_of(prompt.result()) == [expected(logits[i], tokens[i + 1], 1) for i in range(200)]


def test_a_prompt_of_one_token_has_none() -> None:
    prompt = PromptLogprobs(2, 1)
    assert len(prompt.missing(0, 1)) == 0
    prompt.add(LOGITS[:0], [4])
    assert prompt.result().rows() == []
