"""LightGBM as this room uses it: small, seeded, one thread, the same model for the same data."""

from __future__ import annotations

from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def fit(features: Array, target: Array, *, rounds: int, seed: int, **changes: Any) -> lgb.Booster:
    """Boosted trees from `features` [n, F] to `target` [n]."""
    parameters = {
        "objective": "l2",
        "learning_rate": 0.08,
        "num_leaves": 15,
        "min_data_in_leaf": max(5, min(200, len(target) // 100)),
        "feature_fraction": 0.7,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "lambda_l2": 5.0,
        "max_bin": 63,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
        **changes,
    }
    features, target = np.ascontiguousarray(features), np.ascontiguousarray(target)  # of views it makes two copies
    data = lgb.Dataset(features, target, params={"max_bin": parameters["max_bin"], "verbosity": -1}, free_raw_data=True)
    return lgb.train(parameters, data, num_boost_round=rounds)


def predict(trees: lgb.Booster, features: Array) -> Array:
    """What `trees` make of `features` [n, F]: [n]."""
    return np.asarray(trees.predict(features, num_threads=1), np.float32)
