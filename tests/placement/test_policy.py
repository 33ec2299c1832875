"""A policy file: every part has a default, and what is wrong is said in one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from placement.policy import Policy, PolicyError, load_policy
from placement.policy.schema import schema

POLICIES = Path(__file__).parents[2] / "deploy" / "policies"


def refuse(tmp_path: Path, text: str) -> str:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_policy(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "policy.yaml"
    empty.write_text("# nothing\n")
    assert load_policy(None) == load_policy(empty) == Policy()


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("experts:\n  unit: {experts: 2, layers: 1}\n  replicas: 0\n")
    policy = load_policy(file)
    assert (policy.experts.unit.experts, policy.experts.unit.layers, policy.experts.replicas) == (2, 1, 0)
    assert policy.gateway == Policy().gateway


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("expert: {}", "unknown key 'expert': did you mean 'experts'?"),
        ("experts: {unit: {layer: 1}}", "unknown key 'experts.unit.layer': did you mean 'layers'?"),
        ("gateway: {zzz: 1}", "known keys: device, threads"),
        ("experts: {unit: {layers: most}}", "experts.unit.layers"),
        ("experts: {unit: {layers: 0}}", "at least 1, or 'all'"),
        ("experts: {replicas: 9}", "more than max_replicas"),
        ("experts: {replicas: -1}", "experts.replicas: should be greater than or equal to 0 (got -1)"),
        ("experts: {replicas: yes}", "experts.replicas: should not be true or false"),
        ("experts: {min_replicas: 9}", "experts.min_replicas: 9 is more than max_replicas (8): lower it, or raise"),
        ("experts: {memory_mib: 0}", "experts.memory_mib: should be greater than 0"),
        ("experts: {resources: {gpu: 1.5}}", "experts.resources.gpu: a fraction of one GPU or whole ones"),
        ("experts: {resources: {custom: {tpu: -1}}}", "experts.resources.custom.tpu: should be greater than 0"),
        ("experts: {device: {kind: emulated, rows_per_s: 9}}", "experts.device.weight_read_ms: an emulated device"),
        ("experts: {device: {rows_per_s: 9}}", "experts.device.rows_per_s: 9 is a figure of emulated devices"),
        ("experts: {on_loss: mask}", "experts.on_loss: should be 'inline' or 'wait' (got 'mask')"),
        ("planner: {method: best}", "planner.method: should be 'evermoe', 'static'"),
        ("planner: {quantile: 0.7}", "planner.quantile: 0.7 is not forecast: give 0.5 or 0.9"),
        ("planner: {interval_s: .inf}", "planner.interval_s: should be a finite number"),
        ("planner: {warm_pool: 1000}", "planner.warm_pool: should be less than or equal to 256"),
        ("planner: {idle_to_zero: 5}", "unknown key 'planner.idle_to_zero': did you mean 'idle_to_zero_s'?"),
        (
            "overrides: [{min_replicas: 3, max_replicas: 2}]",
            "overrides.0.min_replicas: 3 is more than max_replicas (2)",
        ),
        ("overrides: [{min_replicas: 9}]", "overrides.0.min_replicas: 9 is more than experts.max_replicas (8)"),
        ("overrides: [{pin: true, max_replicas: 0}]", "overrides.0.pin: a pinned slice has at least one copy"),
        ("overrides: [{experts: [0]}]", "overrides.0.min_replicas: the override changes nothing"),
        ("overrides: [{experts: [], pin: true}]", "overrides.0.experts: names nothing"),
        ("overrides: [{expert: [0], pin: true}]", "unknown key 'overrides.0.expert': did you mean 'experts'?"),
        ("overrides: [{experts: [one], pin: true}]", "overrides.0.experts.0: should be a valid integer"),
        ("gateway: {max_batch_tokens: 8}", "no room for one token of each of max_running (64)"),
        ("api: {key: []}", "unknown key 'api.key': did you mean 'keys'?"),
        ("api: {keys: [{name: a, sha: b}]}", "unknown key 'api.keys.0.sha': did you mean 'sha256'?"),
        ("api: {keys: [{name: a}]}", "api.keys.0: give one of sha256, env and file"),
        ("api: {keys: [{name: a, env: A, file: /a}]}", "api.keys.0: give one of sha256, env and file"),
        ("api: {keys: [{name: a b, env: A}]}", "api.keys.0.name"),
        ("api: {keys: [{name: a, env: A}, {name: a, env: B}]}", "keys: two are called 'a'"),
        ("api: {keys: [{name: a, env: A, max_concurrent: 0}]}", "api.keys.0.max_concurrent"),
        ("api: {drain_s: -1}", "api.drain_s: should be greater than or equal to 0 (got -1)"),
        ("[1, 2]", "a policy is a mapping with experts, gateway, api"),
        ("a: b: c", "not YAML"),
        ("experts: {replicas: 1, replicas: 2}", "the key 'replicas' stands twice"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refuse(tmp_path, text)


def test_every_mistake_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "experts: {min_replicas: 9, replicas: 10, unit: {layers: most}, device: {kind: emulated}}\n"
        "planer: {}\n"
        "gateway: {max_batch_tokens: 8}\n"
        "overrides: [{experts: [0]}, {pin: true, pim: true}]\n"
    )
    with pytest.raises(PolicyError) as caught:
        load_policy(file)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    named = [line.removeprefix(f"{file}: ").split(": ")[0] for line in lines]
    assert named == [
        "experts.unit.layers", "experts.device.rows_per_s", "experts.device.weight_read_ms",
        "gateway.max_batch_tokens", "overrides.0.min_replicas", "unknown key 'overrides.1.pim'", "unknown key 'planer'",
    ]  # fmt: skip


def keys_of(section: dict[str, Any], schema: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of a section of the JSON schema and those below it, with what the schema says of it."""
    for key, said in section["properties"].items():
        yield name + key, said
        inner = said.get("$ref") or said.get("items", {}).get("$ref")
        if inner:
            yield from keys_of(schema["$defs"][inner.removeprefix("#/$defs/")], schema, f"{name}{key}.")


def test_the_schema_describes_every_key_and_accepts_what_is_accepted(tmp_path: Path) -> None:
    described = dict(keys_of(schema(), schema()))
    assert len(described) > 60
    assert [key for key, said in described.items() if not said.get("description", "").strip()] == []
    jsonschema.Draft202012Validator.check_schema(schema())
    judge = jsonschema.Draft202012Validator(schema())
    judge.validate(yaml.safe_load((POLICIES / "default.yaml").read_text()))
    for text in ("expert: {}", "experts: {replicas: -1}", "planner: {quantile: 0.7}", "overrides: [{experts: no}]"):
        assert not judge.is_valid(yaml.safe_load(text)), text


def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    assert "sk-secret" not in refuse(tmp_path, "api: {keys: [{name: a, sha256: sk-secret}]}")
    assert "sk-secret" not in refuse(tmp_path, "api: {keys: sk-secret}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.yaml: can't be read"):
        load_policy(tmp_path / "none.yaml")


def test_the_default_file_has_every_key_at_its_default() -> None:
    written = yaml.safe_load((POLICIES / "default.yaml").read_text())
    assert written == Policy().model_dump(mode="json")


@pytest.mark.parametrize("file", sorted(POLICIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_policy_in_the_box_is_valid_and_explains_every_line(file: Path) -> None:
    load_policy(file)
    lines = file.read_text().splitlines()
    assert [line for line in lines if line.strip() and "# " not in line] == []
    assert [line for line in lines if len(line) > 120] == []
