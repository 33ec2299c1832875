"""Which token comes next: exact where it must be, fair where it is drawn, and alike whenever it is asked again."""

from typing import Any

import numpy as np
import pytest
import torch

from gateway.messages import SamplingParams
from gateway.sampler import INVALID, sample, uniform
from gateway.sequence import Sequence

VOCABULARY = 50


def sequence(generated: int = 0, seed: int = 0, **params: Any) -> Sequence:
    return Sequence(
        request_id="r",
        params=SamplingParams(**{"max_tokens": 10_000, **params}),
        tokens=[1, 2, 3] + [4] * generated,
        prompt_length=3,
        seed=seed,
    )


def draws(logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token comes up in `count` draws (50 positions of many seeds), as shares of all."""
    sequences = [sequence(generated=i % 50, seed=i // 50, **params) for i in range(count)]
    tokens = sample(logits.expand(count, -1), sequences)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_greedy_takes_the_best() -> None:
    logits = torch.randn(6, VOCABULARY)
    assert sample(logits, [sequence(temperature=0)] * 6) == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, float("-inf")])
    shares = draws(logits, 40_000, temperature=0.7)
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.01, rtol=0)
    assert shares[4] == 0


def test_top_k_keeps_the_k_best_in_proportion() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.5, -3.0])
    shares = draws(logits, 20_000, top_k=2)
    assert shares[[0, 2, 4]].count_nonzero() == 0
    torch.testing.assert_close(shares[[1, 3]], torch.tensor([2.0, 1.5]).softmax(-1), atol=0.015, rtol=0)


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    logits = torch.randn(8, VOCABULARY)
    assert sample(logits, [sequence(seed=i, temperature=5.0, top_k=1) for i in range(8)]) == logits.argmax(-1).tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert draws(logits, 2000, top_p=0.65).gt(0).tolist() == [False, True, False, True]
    assert draws(logits, 2000, top_p=0.75).gt(0).tolist() == [False, True, True, True]
    assert draws(logits, 2000, top_p=0.01).gt(0).tolist() == [False, True, False, False]


def test_top_p_counts_only_what_top_k_left() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    # Of the two best, 0.4 / 0.7 = 0.57 is not yet 0.6.
    assert draws(logits, 2000, top_k=2, top_p=0.6).gt(0).tolist() == [False, True, False, True]
    assert draws(logits, 2000, top_k=2, top_p=0.55).gt(0).tolist() == [False, True, False, False]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(8, VOCABULARY)
    assert sample(logits, [sequence(seed=i, temperature=1e-30) for i in range(8)]) == logits.argmax(-1).tolist()


def test_a_draw_depends_on_nothing_else_in_the_batch() -> None:
    logits = torch.randn(5, VOCABULARY)
    sequences = [
        sequence(seed=11, generated=3, temperature=1.5),
        sequence(seed=12, temperature=0),
        sequence(seed=13, generated=8, temperature=1.2, top_k=20),
        sequence(seed=14, temperature=0.9, top_p=0.8),
        sequence(seed=15, min_tokens=4, stop_token_ids=(1, 2)),
    ]
    alone = [sample(logits[i : i + 1], sequences[i : i + 1])[0] for i in range(5)]
    assert sample(logits, sequences) == alone
    assert sample(logits.flip(0), sequences[::-1]) == alone[::-1]


def test_a_draw_depends_on_seed_and_position() -> None:
    flat = torch.zeros(200, VOCABULARY)
    one = sample(flat, [sequence(generated=i, seed=1) for i in range(200)])
    other = sample(flat, [sequence(generated=i, seed=2) for i in range(200)])
    assert one == sample(flat, [sequence(generated=i, seed=1) for i in range(200)])
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20
    assert len(set(one)) > 40


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1, -(2**63)])
def test_any_seed_works(seed: int) -> None:
    assert 0 <= sample(torch.zeros(1, VOCABULARY), [sequence(seed=seed)])[0] < VOCABULARY


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    line = np.arange(100_000, dtype=np.uint64)
    zeros = np.zeros_like(line)
    for numbers in (uniform(zeros, line), uniform(line, zeros), uniform(line << np.uint64(40), line)):
        assert ((numbers >= 0) & (numbers < 1)).all()
        histogram = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert np.abs(histogram - 1000).max() < 180  # 5.7 standard deviations
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 5], logits[0, 6], logits[0, 9] = 9.0, 8.0, 7.0
    params: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (5, 6)}
    assert [sample(logits, [sequence(generated=i, **params)])[0] for i in range(4)] == [9, 9, 5, 5]
    assert logits[0, 5] == 9.0  # the caller's logits are left alone


def test_rows_without_a_choice_are_invalid_and_others_unharmed() -> None:
    logits = torch.zeros(4, VOCABULARY)
    logits[0, 3] = float("nan")
    logits[1] = float("-inf")
    logits[2, 8] = 30.0
    logits[3, 7] = float("inf")
    for temperature in (0.0, 1.0):
        chosen = sample(logits, [sequence(temperature=temperature)] * 4)
        assert chosen == [INVALID, INVALID, 8, INVALID]


def test_half_precision_logits_are_fine() -> None:
    logits = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16)
    logits[:, 4] = 20.0
    assert sample(logits, [sequence(temperature=0), sequence(temperature=0.5)]) == [4, 4]
