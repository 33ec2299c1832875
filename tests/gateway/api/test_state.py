"""Models, health and status."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from tests.gateway.api.serving import CONTEXT, NAME, Api, error_of

pytestmark = pytest.mark.anyio


async def test_models_are_listed(api: Api) -> None:
    answer = (await api.http.get("/v1/models")).json()
    assert answer["object"] == "list"
    [card] = answer["data"]
    assert (card["id"], card["object"], card["owned_by"]) == (NAME, "model", "evermoe")
    assert card["max_model_len"] == CONTEXT


async def test_one_model_is_found_by_a_name_with_a_slash(api: Api) -> None:
    assert (await api.http.get(f"/v1/models/{NAME}")).json()["id"] == NAME


async def test_another_is_404(api: Api) -> None:
    error = error_of(await api.http.get("/v1/models/gpt-5"), 404)
    assert error["code"] == "model_not_found"


async def test_health_is_ok_while_a_gateway_answers(api: Api) -> None:
    answer = await api.http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_status_is_what_it_was_given(api: Api) -> None:
    answer = await api.http.get("/evermoe/status")
    assert [unit["unit"] for unit in answer.json()["units"]] == ["expert-0"]
    assert answer.json()["gateways"][0]["running"] == 0


async def test_version_is_ours(api: Api) -> None:
    assert (await api.http.get("/version")).json() == {"version": version("evermoe")}
