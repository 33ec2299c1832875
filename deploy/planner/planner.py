"""The planner: load stream in, forecast and plan out, and models that it trains on the way. Knows nothing of Serve."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import redis
from msgspec import structs

from deploy.planner.foresight import Foresight
from deploy.planner.loads import ExpectedLoad, Loads
from deploy.planner.steering import ModelSlices, Steering
from deploy.planner.training import Memory, Training
from placement import forecast
from placement.forecast import LayerForecast, LoadForecast
from placement.from_policy import round_settings
from placement.policy import Policy
from predictor import storage
from predictor.horizon import Horizon
from predictor.model import LoadModel
from predictor.records import read_records
from predictor.retraining import RetrainPolicy, reason_to_train
from predictor.shape import ModelShape
from predictor.storage import PredictorError
from recovery import load_stream
from recovery.directory import Directory
from recovery.load_stream import LoadMessage

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
_LISTEN_S = 0.2


class Planner:
    """Follows the load stream in a thread until closed; through a Redis that is down it waits.

    Gateways of another model than the one heard of last are forgotten.
    """

    def __init__(
        self,
        policy: Policy,
        model: ModelSlices,
        directory: Directory,
        models: Path,
        *,
        cores: int | None = None,
        delay_s: float = 0.0,
        retrain: RetrainPolicy | None = None,
    ) -> None:
        """`models` is the folder of trained predictors; `delay_s` passes before anything is done.

        `cores` are those of the hosts where replicas run (see `round_settings`).
        """
        self._policy = self._next = policy
        self._cores = cores
        self._directory = directory
        self._models = models
        self._delay_s = delay_s
        self._retrain = retrain or RetrainPolicy()
        self._memory = Memory()
        self._training = Training(models, policy.predictor.horizon_s)
        self._why = ""
        self._loads: Loads | None = None
        self._traffic_since: float | None = None
        self._foresight: Foresight | None = None
        self._foresee(policy)
        self._units = len(model.units)
        settings = round_settings(policy, self._units, cores)
        self._steering = Steering(directory, model, settings, policy.predictor.horizon_s)
        self._model: LoadModel | None = None
        self._version = 0
        self._steps_since = 0
        self._place = "0"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="planner", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def use(self, policy: Policy) -> None:
        """Go on as `policy` says; any thread may call it. Of `enabled` and `models` nothing changes."""
        self._next = policy

    def close(self) -> None:
        """Stop, and end a training that runs."""
        self._stop.set()
        self._thread.join()
        self._training.close()
        self._steering.close()

    def _run(self) -> None:
        self._stop.wait(self._delay_s)
        healthy = True
        while not self._stop.is_set():
            try:
                self._follow()
            except (redis.RedisError, OSError) as error:
                if healthy:
                    log.warning("Redis is lost, nothing is forecast meanwhile: %s", error)
                healthy = False
                self._stop.wait(_AGAIN_S)

    def _follow(self) -> None:
        due = plan_due = time.monotonic()
        while not self._stop.is_set():
            messages, self._place = load_stream.receive(self._directory, self._place, _LISTEN_S)
            for message in messages:
                self._take(message)
            if self._next is not self._policy:
                self._take_over(self._next)
                due = plan_due = 0.0
            now = time.monotonic()
            if now >= due:
                due = now + self._policy.predictor.interval_s
                self._train()
                if self._loads is not None:
                    self._directory.publish(forecast.DOCUMENT, forecast.encode(self._forecast(self._loads)))
            if self._policy.planner.enabled and (now >= plan_due or self._steering.due):
                plan_due = now + self._policy.planner.interval_s
                self._steering.steer(self._expected(now))

    def _expected(self, now: float) -> ExpectedLoad | None:
        if self._foresight is not None:
            return None if self._traffic_since is None else self._foresight.expected(now - self._traffic_since)
        return None if self._loads is None else self._loads.expected(now)

    def _foresee(self, policy: Policy) -> None:
        """Read the record that the policy names, if it does; its first row is the next one that comes."""
        self._foresight, self._traffic_since = None, None
        file = policy.planner.foresight
        if file is not None:
            try:
                self._foresight = Foresight(read_records(file), policy.predictor.horizon_s)
            except ValueError as error:
                log.warning("nothing is foreseen, forecasts are used: %s", error)

    def _take_over(self, policy: Policy) -> None:
        before, self._policy = self._policy, policy
        if policy.planner.foresight is not None or self._foresight is not None:
            self._foresee(policy)
        if not before.planner.enabled:
            self._steering.forget()
        horizon_s = policy.predictor.horizon_s
        self._steering.use(round_settings(policy, self._units, self._cores), horizon_s)
        if horizon_s != before.predictor.horizon_s:
            self._training.horizon_s = horizon_s
            if self._loads is not None:
                self._loads.look(horizon_s)

    def _take(self, message: LoadMessage) -> None:
        try:
            records, steps = message.records(), message.steps()
        except ValueError as error:
            log.warning("a message of the load stream is left out: %s", error)
            return
        if self._loads is None or self._loads.shape != records.shape:
            self._memory = Memory()
            self._load(records.shape)
            self._loads = Loads(records.shape, self._policy.predictor.horizon_s, self._model, time.monotonic())
        now = time.monotonic()
        self._loads.observe(message.gateway, steps, now)
        if steps and self._traffic_since is None:
            self._traffic_since = now - (steps[-1].time_s - steps[0].time_s)
        self._memory.add(message.gateway, records)
        self._steps_since += len(steps)

    def _load(self, shape: ModelShape) -> None:
        """The newest model there is of `shape`."""
        if not storage.versions(self._models):
            return
        try:
            self._model = storage.load(self._models, shape)
            self._version = storage.versions(self._models)[-1]
        except PredictorError as error:
            log.warning("no trained predictor is used: %s", error)

    def _train(self) -> None:
        """Begin to train where there is reason to; take over what was trained."""
        if self._loads is None or not self._policy.predictor.train:
            return
        if self._training.busy:
            if self._training.ended():
                self._load(self._loads.shape)
                self._loads.use(self._model)
            self._why = self._why if self._training.busy else ""
            return
        horizon = Horizon(seconds=self._policy.predictor.horizon_s)
        has_model = self._model is not None and horizon in self._model.horizons
        why = reason_to_train(self._retrain, has_model=has_model, steps=self._steps_since, ratio=self._loads.drift)
        if why is not None:
            log.info("training: %s", why)
            self._why, self._steps_since = why, 0
            self._training.start(self._memory.recordings())

    def _forecast(self, loads: Loads) -> LoadForecast:
        loads.keep([gateway.id for gateway in self._directory.gateways()], time.monotonic())
        each = [follower.forecast() for follower in loads.followers]
        return LoadForecast(
            made_at=time.time(),
            horizon_s=self._policy.predictor.horizon_s,
            gateways=loads.gateways,
            steps=loads.steps,
            model=self._version,
            trained_steps=0 if self._model is None else self._model.trained_steps,
            training=f"under way: {self._why}" if self._why else self._idle(),
            layers=_together(each[-1] if each else [], loads.expected(time.monotonic())),
        )

    def _idle(self) -> str:
        if not self._policy.predictor.train:
            return "off (predictor.train)"
        if self._model is None:
            return f"begins after {self._retrain.first_after} steps"
        return "when the forecast drifts"


def _together(last: list[LayerForecast], load: ExpectedLoad) -> list[LayerForecast]:
    """What all gateways expect, judged by the one that was heard of last."""
    rows, p90 = np.round(load.rows, 1).tolist(), np.round(load.p90, 1).tolist()
    return [structs.replace(layer, expected=rows[i], p90=p90[i]) for i, layer in enumerate(last)]
