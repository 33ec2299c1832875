"""What is known about coming rows, learned online."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.affinity import Affinity
from predictor.lengths import RemainingLengths
from predictor.load_step import SIGNALS
from predictor.queue_ahead import QueueAhead
from predictor.routing import StepRouting
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from predictor.token_affinity import TokenAffinity
from tests.predictor.steps import SHAPE, routings

TINY = ModelShape(fingerprint="t", layers=(3, 5), experts=4, top_k=1, vocabulary=10)


def step(
    tokens: list[int], experts: list[int], *, queue: list[int] | None = None, prefill: bool = True, left: int = 5
) -> StepRouting:
    """One sequence's rows, routed alike in both layers."""
    return StepRouting(
        time_s=0.0,
        token_ids=np.array(tokens, np.int32),
        sequences=np.full(len(tokens), 7, np.int64),
        prefill=np.full(len(tokens), prefill),
        experts=np.broadcast_to(np.array(experts, np.int16)[None, :, None], (2, len(tokens), 1)),
        look_ahead=np.zeros((2, 4), np.int32),
        running=np.array([7], np.int64),
        prompt_left=np.zeros(1, np.int32),
        tokens_left=np.array([left], np.int32),
        queue=[(8, 0, len(queue))] if queue else [],
        prompts={8: np.array(queue, np.int32)} if queue else {},
        waiting=0,
        waiting_tokens=0,
        token_budget=8,
        max_sequences=4,
    )


def test_rows_are_counted_by_layer_expert_and_kind() -> None:
    load = LoadSignals(TINY).observe(step([1, 2, 2], [0, 3, 3]))
    assert load.prefill_counts.tolist() == [[1, 0, 0, 2]] * 2
    assert load.decode_counts.sum() == 0
    assert (load.prefill_rows, load.decode_rows) == (3, 0)


def test_queued_tokens_foretell_the_experts_they_went_to_before() -> None:
    signals = LoadSignals(TINY)
    for _ in range(30):
        signals.observe(step([1, 2], [0, 3], prefill=False))
    for _ in range(5):
        load = signals.observe(step([1, 2], [0, 3], queue=[1, 1, 1, 2], prefill=False))
    queue = load.signals[SIGNALS.index("queue_1"), 0]
    np.testing.assert_allclose(queue, [0.75, 0, 0, 0.25], atol=0.05)
    assert load.signal_rows[SIGNALS.index("queue_1")] == 4


def test_a_token_is_routed_by_the_one_before_it_where_that_is_known() -> None:
    signals = LoadSignals(TINY)
    for _ in range(40):
        signals.observe(step([1, 2], [0, 3]))
        signals.observe(step([3, 2], [0, 1]))
    for _ in range(5):
        load = signals.observe(step([5], [2], queue=[3, 2, 3, 2, 3, 2], prefill=False))
    after_three = load.signals[SIGNALS.index("queue_1"), 0]
    np.testing.assert_allclose(after_three, [0.5, 0.5, 0, 0], atol=0.06)


EVEN = np.full(4, 0.25, np.float32)


def known_tokens() -> TokenAffinity:
    """Token 1 goes to cell 0, token 2 to cell 3, of others nothing is known."""
    affinity = TokenAffinity(10, 4, max_bytes=1 << 10)
    for _ in range(50):
        affinity.learn(np.array([1, 2]), np.array([[0], [3]]), np.zeros(2, bool))
    return affinity


def waiting(*prompts: list[int], begun: int = 0) -> StepRouting:
    """A step after which sequences 1, 2, ... wait; of the first, so many tokens are computed."""
    queue = [(number, 0 if number > 1 else begun, len(prompt)) for number, prompt in enumerate(prompts, 1)]
    known = {number: np.array(prompt, np.int32) for number, prompt in enumerate(prompts, 1)}
    return dataclasses.replace(step([], []), queue=queue, prompts=known)


def test_what_was_computed_meanwhile_does_not_wait_any_more() -> None:
    queue = QueueAhead(known_tokens(), 4)
    queue.look(waiting([1] * 8, [2] * 8), EVEN, 100)
    assert queue.spans()[0][0].argmax() == 0
    queue.passed = 8
    rows, lengths = queue.spans()
    assert rows[0].argmax() == 3
    assert lengths[0] == 8
    assert lengths[-1] == 8
    queue.passed = 100
    assert queue.spans()[1].max() == 0


def test_a_prompt_that_has_begun_waits_with_its_rest() -> None:
    queue = QueueAhead(known_tokens(), 4)
    for begun, rest in ((0, 8), (6, 2)):
        queue.look(waiting([1] * 8, [2] * 8, begun=begun), EVEN, 100)
        rows, lengths = queue.spans()
        assert lengths[-1] == rest + 8
        np.testing.assert_allclose(rows[-1], [rest, 0, 0, 8], atol=0.6)


def test_who_was_not_looked_up_yet_goes_like_the_others() -> None:
    """The rows of tables that a look takes are bounded: a flood is looked up over several."""
    queue, ones = QueueAhead(known_tokens(), 4), []
    for _ in range(6):
        queue.look(waiting(*[[1] * 8] * 5), EVEN, 24)
        ones.append(float(queue.spans()[0][-1][0]))
    assert ones == sorted(ones)
    assert ones[0] < 30 < 38 < ones[-1], "40 tokens, all of one kind"
    queue.look(waiting(), EVEN, 100)
    assert queue.spans()[1].max() == 0


def test_who_waits_for_long_is_looked_up_again() -> None:
    affinity = TokenAffinity(10, 4, max_bytes=1 << 10)
    queue = QueueAhead(affinity, 4)
    queue.look(waiting([1] * 8), EVEN, 100)
    for _ in range(50):
        affinity.learn(np.array([1]), np.array([[2]]), np.zeros(1, bool))
    queue.look(waiting([1] * 8), EVEN, 100)
    assert queue.spans()[0][-1][2] == 2
    for _ in range(40):
        queue.look(waiting([1] * 8), EVEN, 100)
    assert queue.spans()[0][-1][2] > 7


def test_a_prompt_too_long_to_look_up_is_sampled() -> None:
    queue = QueueAhead(known_tokens(), 4)
    queue.look(waiting([1, 2] * 500), EVEN, 24)
    rows, lengths = queue.spans()
    assert lengths[-1] == 64 * 8
    np.testing.assert_allclose(rows[-1].sum(), 64 * 8, rtol=0.01)


def test_what_a_token_does_may_change_and_the_old_is_forgotten() -> None:
    affinity = Affinity(4, 2, memory=20)
    one, two = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
    for _ in range(200):
        affinity.learn(np.array([2]), one)
    for _ in range(100):
        affinity.learn(np.array([2]), two)
    rows, _ = affinity.expect(np.array([2]), np.ones(1, np.float32), 0.0)
    assert rows[1] > 0.95


def test_the_table_is_bounded_whatever_the_vocabulary() -> None:
    affinity = Affinity(200_000, 64, max_bytes=1 << 20)
    assert affinity.buckets * 64 * 4 <= 1 << 20
    buckets = affinity.bucket(np.arange(200_000))
    assert buckets.min() >= 0
    assert buckets.max() < affinity.buckets
    assert len(np.unique(buckets)) > 0.9 * affinity.buckets


def test_an_affinity_is_right_after_very_many_observations() -> None:
    affinity = Affinity(1, 2, memory=5)
    for i in range(500):
        affinity.learn(np.zeros(1, np.int64), np.array([[i % 2]]))
    rows, _ = affinity.expect(np.zeros(1, np.int64), np.ones(1, np.float32), 0.0)
    assert np.isfinite(rows).all()
    assert rows.sum() == pytest.approx(1.0, rel=1e-3)


def test_a_decoding_sequence_goes_on_as_it_did() -> None:
    signals = LoadSignals(TINY)
    for left in range(60, 20, -1):
        load = signals.observe(step([1], [2], prefill=False, left=left))
    near = SIGNALS.index("decode_near")
    assert load.signals[near, 1].argmax() == 2
    assert load.signals[near, 1, 2] > 0.85
    assert 10 < load.signal_rows[near] <= 16


def test_expected_lengths_are_learned_from_those_that_ended() -> None:
    lengths = RemainingLengths()
    before = lengths.expected(np.array([8]), np.array([1000]), 100)
    for _ in range(300):
        for emitted in range(10):
            lengths.observe(np.array([emitted]), np.array([], np.int64))
        lengths.observe(np.array([], np.int64), np.array([10]))
    after = lengths.expected(np.array([8]), np.array([1000]), 100)
    assert before[0] > 50
    assert after[0] < 20
    assert lengths.expected(np.array([3]), np.array([2]), 100)[0] <= 2


def test_a_step_without_rows_is_a_step() -> None:
    empty = step([], [])
    load = LoadSignals(TINY).observe(
        dataclasses.replace(
            empty, running=np.zeros(0, np.int64), prompt_left=np.zeros(0, np.int32), tokens_left=np.zeros(0, np.int32)
        )
    )
    assert load.prefill_counts.sum() == 0
    assert np.isfinite(load.signals).all()


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 5),
    layers=st.integers(1, 3),
    vocabulary=st.integers(1, 40),
    seed=st.integers(0, 10),
    arrivals=st.floats(0, 2),
    data=st.data(),
)
def test_signals_are_shares_or_silent(
    experts: int, layers: int, vocabulary: int, seed: int, arrivals: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    shape = ModelShape("f", tuple(range(layers)), experts, top_k, vocabulary)
    signals = LoadSignals(shape)
    for routing in routings(25, shape=shape, seed=seed, arrivals=arrivals):
        load = signals.observe(routing)
        total = load.signals.sum(axis=2)
        assert ((np.abs(total - 1) < 1e-3) | (total == 0)).all()
        assert (load.signals >= 0).all()
        assert (load.signal_rows >= 0).all()
        assert (load.prefill_counts.sum(axis=1) == load.prefill_rows * top_k).all()


def test_a_sequence_of_numbers_gives_the_same_signals_again() -> None:
    first, second = ([signals.observe(r) for r in routings(80)] for signals in (LoadSignals(SHAPE), LoadSignals(SHAPE)))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.signals, b.signals)
