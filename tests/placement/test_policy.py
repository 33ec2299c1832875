"""A policy file: every part has a default, and what is wrong is said in one line with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.policy import Policy, PolicyError, load_policy


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
        ("experts: {replicas: -1}", "experts.replicas: Input should be greater than or equal to 0 (got -1)"),
        ("gateway: {max_batch_tokens: 8}", "no room for one token of each of max_running (64)"),
        ("api: {key: []}", "unknown key 'api.key': did you mean 'keys'?"),
        ("api: {keys: [{name: a, sha: b}]}", "unknown key 'api.keys.0.sha': did you mean 'sha256'?"),
        ("api: {keys: [{name: a}]}", "api.keys.0: give one of sha256, env and file"),
        ("api: {keys: [{name: a, env: A, file: /a}]}", "api.keys.0: give one of sha256, env and file"),
        ("api: {keys: [{name: a b, env: A}]}", "api.keys.0.name"),
        ("api: {keys: [{name: a, env: A}, {name: a, env: B}]}", "keys: two are called 'a'"),
        ("api: {keys: [{name: a, env: A, max_concurrent: 0}]}", "api.keys.0.max_concurrent"),
        ("api: {drain_s: -1}", "api.drain_s: Input should be greater than or equal to 0 (got -1)"),
        ("[1, 2]", "a policy is a mapping with experts, gateway, api"),
        ("a: b: c", "not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refuse(tmp_path, text)


def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    assert "sk-secret" not in refuse(tmp_path, "api: {keys: [{name: a, sha256: sk-secret}]}")
    assert "sk-secret" not in refuse(tmp_path, "api: {keys: sk-secret}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.yaml: can't be read"):
        load_policy(tmp_path / "none.yaml")


def test_the_policies_in_the_box_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "deploy" / "policies").glob("*.yaml"))
    assert files
    for file in files:
        load_policy(file)
