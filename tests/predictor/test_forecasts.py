"""Forecasts: always shares, better than history where more is known, no better where nothing can be known."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.adaptation import follow
from predictor.choice import METHODS, Trust, validated
from predictor.evaluation import evaluate, hottest_recall, noise_floor
from predictor.features import History
from predictor.forecaster import Forecaster, forecast_error
from predictor.horizon import Horizon
from predictor.load_step import SIGNALS, LoadStep
from predictor.model import Forecast, LoadModel
from predictor.plot import draw
from predictor.records import Records, stack
from predictor.retraining import BackgroundTraining, DriftWatch, RetrainPolicy, reason_to_train
from predictor.samples import load_step, sample
from predictor.shape import ModelShape
from predictor.storage import PredictorError, load, save, versions
from predictor.training import TrainingError, train
from tests.predictor.steps import HORIZON, SHAPE, records


def assert_sound(forecast: Forecast) -> None:
    np.testing.assert_allclose(forecast.shares.sum(axis=2), 1, atol=1e-4)
    for array in (forecast.shares, forecast.rows, forecast.p50, forecast.p90):
        assert np.isfinite(array).all()
        assert (array >= 0).all()
    assert (forecast.p90 >= forecast.p50).all()


def made_up_step(shape: ModelShape, counts: npt.NDArray[np.float64], rows: int) -> LoadStep:
    size = (len(SIGNALS), *counts.shape)
    return LoadStep(
        time_s=0.0,
        prefill_rows=rows,
        decode_rows=0,
        running=0,
        waiting=0,
        waiting_tokens=0,
        prompt_left=0,
        token_budget=8,
        max_sequences=4,
        prefill_counts=counts.astype(np.int32),
        decode_counts=np.zeros_like(counts, np.int32),
        look_ahead=counts.astype(np.int32),
        signals=np.zeros(size, np.float32),
        signal_rows=np.zeros(len(SIGNALS), np.float32),
        foreseen=np.zeros_like(counts, np.float32),
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_came_forecasts_are_shares(model: LoadModel, data: st.DataObject) -> None:
    """Empty layers, all rows on one expert, no rows at all, sudden floods."""
    forecaster = Forecaster(SHAPE, model)
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.sampled_from([0, 1, 500]))
        counts = np.zeros((3, 6))
        counts[np.arange(3), data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=3))] = rows
        if data.draw(st.booleans()):
            counts[data.draw(st.integers(0, 2))] = 0
        forecaster.observe(made_up_step(SHAPE, counts, rows))
        assert_sound(forecaster.forecast(HORIZON))


def test_a_model_of_one_expert_is_no_special_case() -> None:
    shape = ModelShape("one", (0,), 1, 1, 20)
    model = train([records(500, shape=shape)], horizons=[HORIZON])
    forecaster = Forecaster(shape, model)
    forecaster.observe(load_step(records(5, shape=shape), 4))
    forecast = forecaster.forecast(HORIZON)
    assert_sound(forecast)
    assert forecast.shares.tolist() == [[[1.0]]]


def test_before_the_first_model_there_is_a_safe_default(recording: Records) -> None:
    forecaster = Forecaster(SHAPE)
    assert_sound(forecaster.forecast(HORIZON))
    for index in range(200):
        forecaster.observe(load_step(recording, index))
        assert_sound(forecaster.forecast(HORIZON))
    for horizon in (HORIZON, Horizon(seconds=1.0)):
        forecast = forecaster.forecast(horizon)
        assert_sound(forecast)
        assert forecast.rows.sum() > 0
        assert (forecast.p90 >= forecast.rows).all()


def test_what_is_known_beats_every_baseline(model: LoadModel, other_day: Records) -> None:
    evaluation = evaluate(model, [other_day])[0]
    assert evaluation.ratio < 0.9, "the queue's tokens tell what history can't"
    assert evaluation.worst_layer < 1.02
    assert evaluation.errors["chosen"].mean() > 0.5 * evaluation.floor.mean()


def test_p90_is_exceeded_one_time_in_ten(model: LoadModel, other_day: Records) -> None:
    assert 0.8 < evaluate(model, [other_day])[0].coverage.mean() < 0.98


def test_a_shuffled_future_gives_no_gain(recording: Records, other_day: Records) -> None:
    """Where what comes has nothing to do with what is known, nobody beats the mean: else the future leaks."""

    def shuffled(day: Records, seed: int) -> Records:
        order = np.random.default_rng(seed).permutation(len(day))
        future: dict[str, Any] = {
            name: getattr(day, name)[order]
            for name in ("prefill_counts", "decode_counts", "prefill_rows", "decode_rows")
        }
        return dataclasses.replace(day, **future)

    evaluation = evaluate(train([shuffled(recording, 1)], horizons=[HORIZON]), [shuffled(other_day, 2)])[0]
    assert evaluation.errors["chosen"].mean() > 0.97 * evaluation.errors["static mean"].mean()


def test_a_forecast_knows_nothing_of_what_comes_after_it(model: LoadModel, recording: Records) -> None:
    """Nor does what was learned from earlier forecasts."""
    samples = sample(recording, [HORIZON], 1)[0]
    changed = dataclasses.replace(samples.future, counts=samples.future.counts.copy())
    late = samples.ends > samples.steps[300]
    changed.counts[late] = changed.counts[late][..., ::-1] * 3
    other = dataclasses.replace(samples, future=changed)
    first, second = (follow(model.horizons[HORIZON], some) for some in (samples, other))
    np.testing.assert_array_equal(first.shares[:301], second.shares[:301])
    np.testing.assert_array_equal(first.p90[:301], second.p90[:301])
    assert (first.p90[400:] != second.p90[400:]).any(), "what has come is learned from"


def test_live_and_in_evaluation_the_same_is_learned(model: LoadModel, recording: Records) -> None:
    samples = sample(recording, [HORIZON], 4)[0]
    told = follow(model.horizons[HORIZON], samples)
    forecaster, live = Forecaster(SHAPE, model), []
    for index in range(int(samples.steps[-1]) + 1):
        forecaster.observe(load_step(recording, index))
        if index in samples.steps:
            live.append(forecaster.forecast(HORIZON))
    np.testing.assert_allclose(np.concatenate([one.shares for one in live]), told.shares, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([one.p90 for one in live]), told.p90, rtol=1e-3, atol=1e-3)
    assert [c.method for c in forecaster.choices(HORIZON)] == [c.method for c in told.adaptation.trust.choices()]


def test_room_grows_where_more_comes_than_was_learned(model: LoadModel, recording: Records) -> None:
    """Traffic of three times the rows: at first more than p90 says, soon nine times of ten within it."""
    more = {name: 3 * getattr(recording, name) for name in ("prefill_counts", "decode_counts")}
    flood = dataclasses.replace(recording, **more)
    samples = sample(flood, [HORIZON], 1)[0]
    within = (samples.future.counts <= follow(model.horizons[HORIZON], samples).p90).mean(axis=(1, 2))
    assert within[:20].mean() < 0.5
    assert 0.85 < within[len(within) // 2 :].mean() < 0.95


def test_features_know_nothing_of_what_comes_after(recording: Records) -> None:
    """The same past with another future gives the same features."""
    cut = 300
    later: dict[str, Any] = {
        name: np.concatenate([array[:cut], array[cut:][::-1]])
        for name in ("prefill_counts", "signals")
        for array in [getattr(recording, name)]
    }
    changed = dataclasses.replace(recording, **later)
    before, after = (sample(day, [HORIZON], 1)[0] for day in (recording, changed))
    past = before.steps < cut
    np.testing.assert_array_equal(before.shares[past], after.shares[past])
    np.testing.assert_array_equal(before.scalars[past], after.scalars[past])


def test_live_and_recorded_features_are_the_same(recording: Records) -> None:
    history = History(SHAPE)
    for index in range(101):
        history.observe(load_step(recording, index))
    samples = sample(recording, [HORIZON], 1)[0]
    at = samples.steps.tolist().index(100)
    np.testing.assert_array_equal(history.moment().shares, samples.shares[at])


def test_a_horizon_in_seconds_ends_in_time(recording: Records) -> None:
    horizon = Horizon(seconds=0.5)
    ends = horizon.ends(recording.time_s)
    whole = ends >= 0
    assert (recording.time_s[ends[whole]] <= recording.time_s[whole] + 0.5 + 1e-9).all()
    assert not whole[-1]
    with pytest.raises(ValueError, match="either steps or seconds"):
        Horizon()


def test_the_same_records_and_seed_give_the_same_model(model: LoadModel, recording: Records, tmp_path: Path) -> None:
    again = train([recording], horizons=[HORIZON], seed=3)
    for name, trained in (("a", model), ("b", again)):
        save(trained, tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n / "000001").glob("*.txt")} for n in "ab")
    assert first == second


def test_a_model_comes_back_as_it_was_saved(model: LoadModel, recording: Records, tmp_path: Path) -> None:
    assert [save(model, tmp_path, keep=2) for _ in range(3)] == [1, 2, 3]
    assert versions(tmp_path) == [2, 3]
    samples = sample(recording, [HORIZON], 100)[0]
    before, after = (
        m.horizons[HORIZON].forecast(samples.scalars, samples.shares) for m in (model, load(tmp_path, SHAPE))
    )
    np.testing.assert_allclose(before.shares, after.shares, atol=1e-6)
    np.testing.assert_allclose(before.p90, after.p90, rtol=1e-4)


def test_what_cannot_be_used_is_refused(model: LoadModel, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="holds no trained predictor"):
        load(tmp_path)
    save(model, tmp_path)
    other = dataclasses.replace(SHAPE, fingerprint="0" * 64)
    with pytest.raises(PredictorError, match="was trained for another model"):
        load(tmp_path, other)
    with pytest.raises(ValueError, match="this predictor was trained for"):
        Forecaster(other, model)
    (tmp_path / "000001" / "0-layer-1.txt").write_text("nonsense")
    with pytest.raises(PredictorError, match="is damaged or of another release"):
        load(tmp_path)


def test_too_few_records_are_refused() -> None:
    with pytest.raises(TrainingError, match="too few to learn"):
        train([records(60)], horizons=[HORIZON])
    with pytest.raises(TrainingError, match="one model"):
        train([records(60), records(60, shape=dataclasses.replace(SHAPE, fingerprint="x"))])


def test_each_layer_is_carried_by_what_won_and_says_why() -> None:
    actual = np.tile(np.array([0.5, 0.5], np.float32), (10, 2, 1))
    wrong, right = actual.copy(), actual.copy()
    wrong[:, 0], right[:, 1] = (1, 0), (1, 0)
    bad = np.tile(np.array([1, 0], np.float32), (10, 2, 1))
    choices = validated({**dict.fromkeys(METHODS, bad), "average 16": wrong, "lightgbm": right}, actual)
    assert [choice.method for choice in choices] == ["lightgbm", "average 16"]
    assert choices[0].reason == "lightgbm carries 96%: error 0.0000 on validation, the next best (average 16) 0.5000"


def errors_of(**errors: float) -> npt.NDArray[np.float64]:
    """[METHODS, 1]: what is not told errs by 0.2."""
    return np.array([[errors.get(name.replace(" ", "_"), 0.2)] for name in METHODS])


def test_trust_goes_to_whatever_errs_least_and_comes_back() -> None:
    trust = Trust(errors_of(lightgbm=0.1))
    assert trust.choices()[0].method == "lightgbm"
    for _ in range(60):
        trust.learn(errors_of(lightgbm=0.3, average_64=0.15), 1.0)
    drifted = trust.choices()[0]
    assert drifted.method == "average 64"
    assert drifted.part > 0.5
    assert re.match("average 64 carries .* error 0.15.. lately, the next best", drifted.reason)
    for _ in range(60):
        trust.learn(errors_of(lightgbm=0.1), 1.0)
    assert trust.choices()[0].method == "lightgbm"
    np.testing.assert_allclose(trust.weights.sum(axis=0), 1)


def test_a_layer_in_which_nothing_came_changes_no_trust() -> None:
    trust = Trust(errors_of(mixture=0.1))
    before = trust.choices()[0]
    trust.learn(errors_of(mixture=0.0) * 0, 0.0)
    assert trust.choices()[0] == before


def test_scores_are_what_they_say(recording: Records) -> None:
    forecast = np.array([[[0.5, 0.3, 0.2, 0.0]]], np.float32)
    assert hottest_recall(forecast, forecast)[0] == 1
    assert hottest_recall(forecast, forecast[..., ::-1])[0] == 0
    actual = np.array([[3, 3, 2, 0, 0, 0]] * 3)
    even = Forecaster(SHAPE).forecast(HORIZON)
    np.testing.assert_allclose(forecast_error(even, actual), 0.5, atol=1e-6)
    assert np.isnan(forecast_error(even, np.zeros((3, 6), int))).all()
    assert (noise_floor(sample(recording, [HORIZON], 10)[0]) < 0.5).all()


def test_a_picture_is_drawn(model: LoadModel, other_day: Records, tmp_path: Path) -> None:
    draw(model, other_day, HORIZON, tmp_path / "loads.png")
    assert (tmp_path / "loads.png").read_bytes().startswith(b"\x89PNG")


def test_when_to_train() -> None:
    policy = RetrainPolicy(first_after=10, at_least=20, at_most=100, drift=1.3)
    assert reason_to_train(policy, has_model=False, steps=9, ratio=1.0) is None
    assert "no model yet" in str(reason_to_train(policy, has_model=False, steps=10, ratio=1.0))
    assert reason_to_train(policy, has_model=True, steps=19, ratio=9.0) is None
    assert "drift" in str(reason_to_train(policy, has_model=True, steps=20, ratio=1.4))
    assert reason_to_train(policy, has_model=True, steps=99, ratio=1.2) is None
    assert "since the last" in str(reason_to_train(policy, has_model=True, steps=100, ratio=1.2))


def test_drift_is_noticed_and_noise_is_not() -> None:
    watch = DriftWatch(promised=0.1, memory=50)
    watch.observe(0.9)
    assert watch.ratio == 1.0, "one forecast tells nothing"
    for _ in range(200):
        watch.observe(0.1)
    watch.observe(float("nan"))
    assert watch.ratio == pytest.approx(1.0, abs=0.1)
    for _ in range(100):
        watch.observe(0.2)
    assert watch.ratio > 1.6


def test_training_runs_beside_and_its_model_is_swapped_in(recording: Records) -> None:
    steps = [load_step(recording, index) for index in range(len(recording))]
    go = Event()

    def when_told(parts: list[Records]) -> LoadModel:
        go.wait(60)
        return train(parts, horizons=[HORIZON])

    forecaster = Forecaster(SHAPE)
    with ThreadPoolExecutor(1) as executor:
        background = BackgroundTraining(SHAPE, executor, when_told, keep_steps=500)
        for step in steps:
            background.add(step)
            forecaster.observe(step)
        background.start()
        assert background.busy
        assert background.take() is None, "nobody waits"
        assert_sound(forecaster.forecast(HORIZON))
        background.start()  # one at a time
        go.set()
    model = background.take()
    assert model is not None
    assert model.trained_steps == 500
    forecaster.use(model)
    assert_sound(forecaster.forecast(HORIZON))
    assert background.take() is None


def test_a_training_that_fails_says_so(recording: Records) -> None:
    with ThreadPoolExecutor(1) as executor:
        background = BackgroundTraining(SHAPE, executor, partial(train, horizons=[HORIZON]))
        background.add(load_step(recording, 0))
        background.start()
    with pytest.raises(TrainingError, match="too few"):
        background.take()
    assert not background.busy


def test_stacked_steps_are_records(recording: Records) -> None:
    again = stack(SHAPE, [load_step(recording, index) for index in range(20)])
    np.testing.assert_array_equal(again.counts, recording.counts[:20])
