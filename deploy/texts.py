"""Text for made-up traffic: the kinds that the default model was trained on, as tokens of whatever model is served."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from deploy.model.corpus import KINDS, documents
from deploy.models import cache_dir

Tokens = npt.NDArray[np.int32]

_SEPARATOR = "\n\n"


class TextError(ValueError):
    """There is no text for a model; the message is one line for the operator."""


def plain_texts(characters: int) -> dict[str, str]:
    """For each kind of text about so many characters of it."""
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    left: dict[str, int] = dict.fromkeys(KINDS, characters)
    for document in documents("train"):
        if left[document.kind] > 0:
            part = document.text[: left[document.kind]] + _SEPARATOR
            texts[document.kind].append(part)
            left[document.kind] -= len(part)
        elif all(missing <= 0 for missing in left.values()):
            break
    return {kind: "".join(parts) for kind, parts in texts.items()}


def token_streams(model: Path, vocabulary: int) -> dict[str, Tokens]:
    """For each kind of text one stream of tokens [N], of the model or store in `model`; kept in the cache.

    Raise TextError for a model without a tokenizer, or with one that does not belong to it.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        raise TextError(f"{model} has no tokenizer.json: traffic is made of text, and nobody can turn that into tokens")
    name = hashlib.sha256(f"{platform.python_version()} {_SEPARATOR!r}".encode() + file.read_bytes()).hexdigest()[:16]
    cached = cache_dir() / "texts" / f"{name}.npz"
    if not cached.is_file():
        _write(cached, _tokenize(file))
    with np.load(cached) as streams:
        found: dict[str, Tokens] = {kind: streams[kind] for kind in KINDS}
    largest = max(int(stream.max()) for stream in found.values())
    if largest >= vocabulary:
        raise TextError(
            f"{file} knows token {largest}, and the model ends at {vocabulary - 1}: they do not go together"
        )
    return found


def _tokenize(file: Path) -> dict[str, Tokens]:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for document in documents("train"):
        texts[document.kind].append(document.text + _SEPARATOR)
    streams = {}
    for kind, whole in texts.items():
        encodings = tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        streams[kind] = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])
    return streams


def _write(path: Path, streams: dict[str, Tokens]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(aside, **streams)  # type: ignore[arg-type]  # numpy's stub takes the keyword `allow_pickle` for one of them
    aside.replace(path)
