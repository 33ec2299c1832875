"""Text to tokens and back, from a store's tokenizer files.

With a ``tokenizer.json`` only the `tokenizers` library is imported. Other formats are converted by transformers, which
costs an api process seconds of start-up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from experts.errors import StoreError
from gateway.api.chat_template import ChatTemplate, TemplateError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer, and the chat template of its model where it has one. Safe to use from several threads."""

    def __init__(self, backend: Backend, special: Mapping[str, str], template: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special = dict(special)
        """Named special tokens: ``eos_token`` -> its text."""
        self.chat = ChatTemplate(template, special) if template else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a store or checkpoint; raise StoreError where there is none, or a broken one."""
        if not (folder / "tokenizer.json").exists():
            return _convert(folder)
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        special = {name: _text(settings[name]) for name in _NAMED if settings.get(name) is not None}
        backend = _read_backend(folder / "tokenizer.json")
        _add_tokens(backend, settings, special)
        try:
            return cls(backend, special, _chat_template(folder, settings))
        except TemplateError as error:
            raise StoreError(f"{folder}: {error}") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, framed (by BOS, say) as tokenizer.json says.

        Raise ValueError for a text that is not valid Unicode (half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text has half of a surrogate pair, which is not valid Unicode") from error
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out with `skip_special`, ids without a token always."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    @property
    def size(self) -> int:
        """Tokens there are, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def serialised(self) -> str:
        """The whole tokenizer as a ``tokenizer.json`` holds it."""
        return str(self._backend.to_str())

    def token(self, id: int) -> str:
        """How the vocabulary writes a token; empty for an id without one."""
        return str(self._backend.id_to_token(id) or "")

    def token_id(self, token: str) -> int | None:
        """The id of the token written `token`."""
        found: int | None = self._backend.token_to_id(token)
        return found


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise StoreError(f"{path} is no tokenizer: {error}") from error


def _add_tokens(backend: Backend, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Tokens that tokenizer_config.json declares and older tokenizer.json files do not hold."""
    declared = settings.get("added_tokens_decoder", {})
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    names = [*special.values(), *map(_text, more.values() if isinstance(more, dict) else more)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for entry in (declared[key] for key in sorted(declared, key=int)):
        if entry["content"] not in known:
            backend.add_tokens([AddedToken(**{key: value for key, value in entry.items() if key != "__type"})])
    known |= {entry["content"] for entry in declared.values()}
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names if name not in known])


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """``chat_template.jinja``, or the ``default`` one of those in a JSON file; models before 2025 have the latter."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = _read_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _convert(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # transformers raises whatever its converters stumble over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(
            f"{folder} has no tokenizer.json, and transformers cannot make one of what is there ({reason}): "
            "add the model's tokenizer files to the checkpoint and prepare it again"
        ) from error
    special = {name: text for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    return Tokenizer(backend, special, loaded.chat_template if isinstance(loaded.chat_template, str) else None)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that may be missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}): copy it from the model again") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds no JSON object: copy it from the model again")
    return content


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
