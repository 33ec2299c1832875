"""Which token comes next: exact where it must be, fair where it is drawn, and alike whenever it is asked again."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.messages import SamplingParams
from gateway.sampler import INVALID, _invert, sample, uniform
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


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert draws(logits, 2000, min_p=0.6).gt(0).tolist() == [False, True, False, True]
    assert draws(logits, 2000, min_p=0.45).gt(0).tolist() == [False, True, True, True]
    assert draws(logits, 200, min_p=1.0).gt(0).tolist() == [False, True, False, False]


def test_min_p_goes_by_the_tempered_distribution() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert draws(logits, 2000, min_p=0.6, temperature=2.0).gt(0).tolist() == [False, True, True, True]  # sqrt(0.5)


def test_top_p_counts_only_what_min_p_left() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    # Of the 0.7 that 0.4 and 0.3 have, 0.4 is 0.57.
    assert draws(logits, 2000, min_p=0.6, top_p=0.56).gt(0).tolist() == [False, True, False, False]


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 300, 1000]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    top_k=st.sampled_from([0, 1, 5, 280, 5000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    temperature=st.sampled_from([0.2, 1.0, 1.9]),
)
def test_a_draw_is_one_of_the_tokens_that_are_kept(
    seed: int, vocabulary: int, spread: float, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * spread
    one = sequence(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    other = sequence(seed=seed, top_p=0.5)
    for row, token in zip(logits[::2], sample(logits, [one, other, one])[::2], strict=True):
        assert token in kept((row / temperature).softmax(-1).tolist(), top_k, top_p, min_p)


def kept(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition, one token after the other; ties and what is within rounding of a border count as kept."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    order = [i for i in order if probabilities[i] >= min_p * probabilities[order[0]] * (1 - 1e-5)]
    order = order[: top_k or None]
    total = sum(probabilities[i] for i in order)
    last, mass = 0.0, 0.0
    for i in order:
        if mass < top_p * total * (1 + 1e-5):
            last = probabilities[i]
        mass += probabilities[i]
    return {i for i, p in enumerate(probabilities) if p >= last * (1 - 1e-5) and p > 0}


def test_an_even_distribution_over_a_large_vocabulary_is_drawn_from_everywhere() -> None:
    tokens = sample(torch.zeros(4000, 3001), [sequence(seed=i) for i in range(4000)])
    assert np.histogram(tokens, bins=10, range=(0, 3001))[0].min() > 300
    wide = sample(torch.zeros(4000, 3001), [sequence(seed=i, top_p=0.9, temperature=0.5) for i in range(4000)])
    assert np.histogram(wide, bins=10, range=(0, 3001))[0].min() > 300


def test_no_token_of_probability_0_is_drawn() -> None:
    logits = torch.full((1, 200), float("-inf")).repeat(2000, 1)
    logits[:, 63] = logits[:, 64] = logits[:, 130] = 0.0
    assert set(sample(logits, [sequence(seed=i) for i in range(2000)])) == {63, 64, 130}


@pytest.mark.parametrize("number", [0.0, 0.25, 0.4999999999, 0.5, 0.9999999, 1 - 2**-53])
def test_inversion_takes_the_first_token_that_exceeds_the_number(number: float) -> None:
    weights = torch.zeros(1, 100)
    weights[0, [7, 70, 71, 99]] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    expected = [7, 70, 71, 99][int(number * 4)]
    assert _invert(weights * 3, np.array([number])).tolist() == [expected]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(8, VOCABULARY)
    assert sample(logits, [sequence(seed=i, temperature=1e-30) for i in range(8)]) == logits.argmax(-1).tolist()


def test_a_draw_depends_on_nothing_else_in_the_batch() -> None:
    logits = torch.randn(7, VOCABULARY)
    sequences = [
        sequence(seed=11, generated=3, temperature=1.5),
        sequence(seed=12, temperature=0),
        sequence(seed=13, generated=8, temperature=1.2, top_k=20),
        sequence(seed=14, temperature=0.9, top_p=0.8),
        sequence(seed=15, min_tokens=4, stop_token_ids=(1, 2)),
        sequence(seed=16, generated=5, frequency_penalty=1.0, repetition_penalty=1.3, logit_bias={7: 4.0}),
        sequence(seed=17, min_p=0.2, logprobs=3),
    ]
    alone = [sample(logits[i : i + 1], sequences[i : i + 1])[0] for i in range(7)]
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
