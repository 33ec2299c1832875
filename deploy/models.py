"""Which model to serve: the one in the box, a checkpoint that is prepared into the cache first, or a prepared store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from placement.policy.fitting import ModelFacts

if TYPE_CHECKING:
    from experts.manifest import Manifest
    from experts.store import ExpertStore

DEFAULT_MODEL = Path(__file__).parent / "model" / "evermoe-tiny"

Progress = Callable[[int, int, str], None]


def cache_dir() -> Path:
    """Where prepared stores are kept: EVERMOE_CACHE, or the user's cache directory."""
    base = os.environ.get("EVERMOE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "evermoe"


def ensure_store(model: Path, *, dtype: str = "auto", progress: Progress | None = None) -> ExpertStore:
    """The verified store of `model`, prepared into the cache where it is a checkpoint.

    Raise StoreError for what is neither, or damaged.
    """
    from experts.store import ExpertStore, prepare  # imports torch, which takes a second

    if (model / "manifest.json").exists():
        return ExpertStore.open(model, verify=True)
    store = cache_dir() / "stores" / _cache_name(model, dtype)
    if (store / "manifest.json").exists():
        return ExpertStore.open(store, verify=True)
    return prepare(model, store, dtype=dtype, progress=progress)


def model_facts(manifest: Manifest, name: str) -> ModelFacts:
    """What a policy has to fit."""
    return ModelFacts(
        name=name, experts=manifest.num_experts, layers=manifest.moe_layers, slice_bytes=manifest.slice_bytes
    )


def find_manifest(model: Path, *, dtype: str = "auto") -> Manifest | None:
    """The manifest of a prepared store, or of a checkpoint's in the cache; None where nothing is prepared yet."""
    from experts.manifest import NAME, Manifest

    folders = (model, cache_dir() / "stores" / _cache_name(model, dtype))
    return next((Manifest.read(folder) for folder in folders if (folder / NAME).exists()), None)


def _cache_name(model: Path, dtype: str) -> str:
    """Changes whenever a file of the checkpoint does."""
    files = sorted(model.iterdir()) if model.is_dir() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(model.resolve()), dtype, stamps)).encode()).hexdigest()[:16]
    return f"{model.resolve().name}-{digest}"
