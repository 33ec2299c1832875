"""Trained predictors in a folder: one numbered version beside the other, each complete or not there.

A version holds ``model.json`` (shape, seed, horizons, choices), ``arrays.npz`` and one LightGBM text file for each of
its models. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from predictor.baselines import HistoryRidge
from predictor.batch_arithmetic import Pace
from predictor.choice import METHODS, Choice
from predictor.features import SCALARS, SHARES
from predictor.headroom import LEVELS, Headroom
from predictor.horizon import Horizon
from predictor.layer_trees import LayerTrees
from predictor.mixture import SOURCES, Mixture
from predictor.model import HorizonModel, LoadModel
from predictor.rows_model import RowsModel
from predictor.shape import ModelShape

FORMAT = 2


class PredictorError(ValueError):
    """A folder whose predictor cannot be used; the message says why, and what to do."""


def save(model: LoadModel, folder: str | os.PathLike[str], *, keep: int = 5) -> int:
    """Add `model` to `folder` as its newest version and return the number; only the last `keep` versions stay."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        _write(model, aside)
        number = max(versions(folder), default=0) + 1
        aside.rename(folder / f"{number:06d}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in versions(folder)[:-keep]:
        shutil.rmtree(folder / f"{old:06d}", ignore_errors=True)
    return number


def versions(folder: str | os.PathLike[str]) -> list[int]:
    """The numbers of the versions in `folder`, rising."""
    folder = Path(folder)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def load(folder: str | os.PathLike[str], shape: ModelShape | None = None) -> LoadModel:
    """The newest version in `folder`; raise PredictorError where there is none, or it is not of `shape`, if given."""
    folder = Path(folder)
    found = versions(folder)
    if not found:
        raise PredictorError(f"{folder} holds no trained predictor; make one with `evermoe predictor train`")
    path = folder / f"{found[-1]:06d}"
    try:
        model = _read(path)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, lgb.basic.LightGBMError) as error:
        raise PredictorError(f"{path} is damaged or of another release ({error}); train it again") from error
    if shape is not None and model.shape != shape:
        raise PredictorError(
            f"{path} was trained for another model: {model.shape}, not {shape}; train one from this model's records"
        )
    return model


def _write(model: LoadModel, folder: Path) -> None:
    described = []
    arrays: dict[str, npt.NDArray[Any]] = {}
    for index, (horizon, part) in enumerate(model.horizons.items()):
        described.append(
            {**dataclasses.asdict(horizon), "choices": [[c.method, dict(c.errors), c.part] for c in part.choices]}
        )
        arrays |= {f"{index}:{name}": array for name, array in _arrays(part).items()}
        for name, booster in _boosters(part):
            booster.save_model(folder / f"{index}-{name}.txt")
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for `allow_pickle`
    head = {
        "format": FORMAT,
        "features": _FEATURES,
        "shape": json.loads(model.shape.to_json()),
        "seed": model.seed,
        "trained_steps": model.trained_steps,
        "horizons": described,
    }
    (folder / "model.json").write_text(json.dumps(head, indent=1))


_FEATURES = [*SCALARS, *SHARES, *(f"{kind}:{name}" for kind, name, _ in SOURCES), *METHODS]


def _arrays(part: HorizonModel) -> dict[str, npt.NDArray[Any]]:
    return {
        "ridge.weights": part.ridge.weights,
        "ridge.bias": part.ridge.bias,
        "mixture.weights": part.mixture.weights,
        "static": part.mixture.static,
        "above": part.trees.above,
        "shifts": part.headroom.shifts,
        "pace": np.array(dataclasses.astuple(part.rows.pace)),
    }


def _boosters(part: HorizonModel) -> Iterator[tuple[str, lgb.Booster]]:
    yield "prefill", part.rows.prefill
    yield "decode", part.rows.decode
    yield from ((f"layer-{layer}", booster) for layer, booster in enumerate(part.trees.boosters))
    yield from ((f"quantile-{level}", booster) for level, booster in part.headroom.boosters.items())


def _read(folder: Path) -> LoadModel:
    head = json.loads((folder / "model.json").read_text())
    if head["format"] != FORMAT or head["features"] != _FEATURES:
        raise ValueError("its features are not those of this release")
    shape = ModelShape.from_json(json.dumps(head["shape"]))
    with np.load(folder / "arrays.npz") as arrays:
        horizons = {
            Horizon(part["steps"], part["seconds"]): _part(folder, index, part, shape, arrays)
            for index, part in enumerate(head["horizons"])
        }
    return LoadModel(shape, head["seed"], head["trained_steps"], horizons)


def _part(
    folder: Path, index: int, described: Mapping[str, Any], shape: ModelShape, arrays: Mapping[str, npt.NDArray[Any]]
) -> HorizonModel:
    def array(name: str) -> npt.NDArray[np.float32]:
        return np.asarray(arrays[f"{index}:{name}"], np.float32)

    def booster(name: str) -> lgb.Booster:
        text = (folder / f"{index}-{name}.txt").read_text()
        return lgb.Booster(model_str=text)

    boosters = [booster(f"layer-{layer}") for layer in range(len(shape.layers))]
    choices = tuple(Choice(*choice) for choice in described["choices"])
    if len(choices) != len(shape.layers) or array("static").shape != (len(shape.layers), shape.experts):
        raise ValueError("its parts are of different sizes")
    return HorizonModel(
        top_k=shape.top_k,
        rows=RowsModel(
            Horizon(described["steps"], described["seconds"]),
            Pace(*arrays[f"{index}:pace"].tolist()),
            booster("prefill"),
            booster("decode"),
        ),
        ridge=HistoryRidge(array("ridge.weights"), array("ridge.bias")),
        mixture=Mixture(array("mixture.weights"), array("static")),
        trees=LayerTrees(boosters, array("above"), array("static")),
        headroom=Headroom({level: booster(f"quantile-{level}") for level in LEVELS}, array("shifts")),
        choices=choices,
    )
