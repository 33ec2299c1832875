"""The application builder, as `serve run deploy.app:build` and a `serve deploy` file use it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError

from deploy.app import AppArgs, build
from experts.errors import StoreError
from tests.waiting import eventually

SERVE_FILE = Path(__file__).parents[2] / "deploy" / "serve.yaml"


def test_serve_is_told_what_arguments_there_are() -> None:
    assert inspect.signature(build).parameters["args"].annotation is AppArgs


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValidationError, match="modle"):
        AppArgs.model_validate({"modle": "x"})


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        build(AppArgs(model=str(tmp_path / "nowhere")))


def test_the_serve_file_in_the_box_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(SERVE_FILE.read_text()))
    (application,) = schema.applications
    assert application.import_path == "deploy.app:build"
    AppArgs.model_validate(application.args)


def _units(url: str) -> list[dict[str, Any]]:
    return list(httpx.get(f"{url}/evermoe/status", timeout=30).json()["units"])


@pytest.mark.ray
def test_an_application_brings_its_own_store_and_serves(
    ray_cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    monkeypatch.setenv("EVERMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REDIS_URL", raising=False)
    policy = tmp_path / "policy.yaml"
    policy.write_text("experts: {unit: {experts: 4, layers: 2}}\n")
    url = f"http://127.0.0.1:{ray_cluster}"
    serve.run(build(AppArgs(policy=str(policy), name="mine")), name="built", route_prefix="/")
    try:
        body = {"model": "mine", "prompt": "import", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 4
        eventually(lambda: sum(unit["ready"] for unit in _units(url)) == 4, 120, "all replicas are ready")
        assert [unit["unit"] for unit in _units(url)] == [
            "expert-0-3.layer-0-1", "expert-0-3.layer-2-3", "expert-4-7.layer-0-1", "expert-4-7.layer-2-3",
        ]  # fmt: skip
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    finally:
        serve.delete("built")
