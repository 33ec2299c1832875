"""The Serve deployment of the planner.

Whoever assembles the application imports this; LightGBM is imported only where a planner runs, and gently.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import ray
from ray import serve

from deploy.planner.steering import ModelSlices
from placement.policy import Policy
from recovery.directory import Directory
from recovery.policies import PolicyReader

_PRIORITY = 10
_DELAY_S = 3.0
"""Left to expert replicas, which start at the same time and are of more use."""


class PlannerReplica:
    """Serve makes one. Everything it does is between it and Redis: requests never wait for it."""

    def __init__(self, policy: Policy, model: ModelSlices, redis_url: str, namespace: str, models: str) -> None:
        self._policy = policy
        self._model = model
        self._directory = Directory(redis_url, namespace)
        self._models = Path(models)
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._starting = threading.Thread(target=self._start, name="start-planner", daemon=True)
        self._starting.start()

    def _start(self) -> None:
        os.nice(_PRIORITY)  # on Linux it is the thread's own, and of those it starts
        if self._stop.wait(_DELAY_S):
            return
        try:
            from deploy.planner.planner import Planner

            cores = int(ray.cluster_resources().get("CPU", 1))
            planner = self._planner = Planner(self._policy, self._model, self._directory, self._models, cores=cores)
            self._planner.start()
            self._policies = PolicyReader(self._directory, planner.use)
        except BaseException as failure:
            self._failure = failure
            raise

    def check_health(self) -> None:
        """Serve's health check: raises where the planner no longer follows the load."""
        if self._failure is not None:
            raise RuntimeError(f"the planner did not start: {self._failure}")
        if hasattr(self, "_planner") and not self._planner.alive:
            raise RuntimeError("the planner's thread has ended")

    def __del__(self) -> None:
        """Serve's way to end a planner."""
        if hasattr(self, "_starting"):
            self._stop.set()
            self._starting.join()
        if hasattr(self, "_policies"):
            self._policies.close()
        if hasattr(self, "_planner"):
            self._planner.close()


def planner_deployment(
    policy: Policy, model: ModelSlices, redis_url: str, namespace: str, models: str
) -> serve.Application:
    """The Serve application node of the planner; `models` is where predictors are kept where the policy names none."""
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "policy": {
            "policy_function": "deploy.planner.autoscaling:OncePlanned",
            "policy_kwargs": {"redis_url": redis_url, "namespace": namespace},
        },
    }
    deployment = serve.deployment(
        PlannerReplica,
        name="planner",
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
    )
    folder = models if policy.predictor.models is None else str(policy.predictor.models.resolve())
    return deployment.bind(policy, model, redis_url, namespace, folder)
