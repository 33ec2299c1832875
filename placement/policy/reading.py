"""A policy from its YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from placement.policy.mistakes import mistakes
from placement.policy.policy import Policy


class PolicyError(ValueError):
    """The policy can't be used; each line of the message is one mistake, with file, key and remedy."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


def load_policy(path: Path | None) -> Policy:
    """The policy of a YAML file, or the default one; raise PolicyError."""
    if path is None:
        return Policy()
    try:
        document = yaml.load(path.read_text(), _OneOfEach)
    except OSError as error:
        raise PolicyError(f"{path}: can't be read ({error.strerror}): give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_policy(document, str(path))


def parse_policy(document: Any, name: str) -> Policy:
    """The policy of a parsed document (None: all defaults); `name` is its file in errors."""
    if document is None:
        return Policy()
    if not isinstance(document, dict):
        known = ", ".join(Policy.model_fields)
        raise PolicyError(f"{name}: a policy is a mapping with {known}, not a {type(document).__name__}")
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        raise PolicyError(*(f"{name}: {mistake}" for mistake in mistakes(error))) from error


class _OneOfEach(yaml.SafeLoader):
    """YAML in which no key stands twice: PyYAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`; raise ConstructorError for a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                sentence = f"the key '{key_node.value}' stands twice: remove one"
                raise yaml.constructor.ConstructorError(None, None, sentence, key_node.start_mark)
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)
