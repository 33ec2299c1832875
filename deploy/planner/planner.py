"""The planner: load stream in, forecast and plan out, and models that it trains on the way. Knows nothing of Serve."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import redis
from msgspec import structs

from deploy.planner.loads import ExpectedLoad, Loads
from deploy.planner.steering import ModelSlices, Steering
from deploy.planner.training import Memory, Training
from placement import forecast
from placement.forecast import LayerForecast, LoadForecast
from placement.from_policy import round_settings
from placement.policy import Policy
from predictor import storage
from predictor.model import LoadModel
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
        self._policy = policy.predictor
        self._interval_s = policy.planner.interval_s
        self._directory = directory
        self._models = models
        self._delay_s = delay_s
        self._retrain = retrain or RetrainPolicy()
        self._memory = Memory()
        self._training = Training(models, policy.predictor.horizon_s)
        self._why = ""
        self._loads: Loads | None = None
        self._steering = None
        if policy.planner.enabled:
            settings = round_settings(policy, len(model.units), cores)
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

    def close(self) -> None:
        """Stop, and end a training that runs."""
        self._stop.set()
        self._thread.join()
        self._training.close()
        if self._steering is not None:
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
            now = time.monotonic()
            if now >= due:
                due = now + self._policy.interval_s
                self._train()
                if self._loads is not None:
                    self._directory.publish(forecast.DOCUMENT, forecast.encode(self._forecast(self._loads)))
            if self._steering is not None and (now >= plan_due or self._steering.due):
                plan_due = now + self._interval_s
                self._steering.steer(None if self._loads is None else self._loads.expected(now))

    def _take(self, message: LoadMessage) -> None:
        try:
            records, steps = message.records(), message.steps()
        except ValueError as error:
            log.warning("a message of the load stream is left out: %s", error)
            return
        if self._loads is None or self._loads.shape != records.shape:
            self._memory = Memory()
            self._load(records.shape)
            self._loads = Loads(records.shape, self._policy.horizon_s, self._model, time.monotonic())
        self._loads.observe(message.gateway, steps, time.monotonic())
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
        if self._loads is None or not self._policy.train:
            return
        if self._training.busy:
            if self._training.ended():
                self._load(self._loads.shape)
                self._loads.use(self._model)
            self._why = self._why if self._training.busy else ""
            return
        has_model = self._model is not None
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
            horizon_s=self._policy.horizon_s,
            gateways=loads.gateways,
            steps=loads.steps,
            model=self._version,
            trained_steps=0 if self._model is None else self._model.trained_steps,
            training=f"under way: {self._why}" if self._why else self._idle(),
            layers=_together(each[-1] if each else [], loads.expected(time.monotonic())),
        )

    def _idle(self) -> str:
        if not self._policy.train:
            return "off (predictor.train)"
        if self._model is None:
            return f"begins after {self._retrain.first_after} steps"
        return "when the forecast drifts"


def _together(last: list[LayerForecast], load: ExpectedLoad) -> list[LayerForecast]:
    """What all gateways expect, judged by the one that was heard of last."""
    rows, p90 = np.round(load.rows, 1).tolist(), np.round(load.p90, 1).tolist()
    return [structs.replace(layer, expected=rows[i], p90=p90[i]) for i, layer in enumerate(last)]
