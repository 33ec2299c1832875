"""What single tokens are: bytes, which need not be whole characters."""

from __future__ import annotations

import functools
import threading

import llguidance

from gateway.api.tokenizer import Tokenizer


class TokenBytes:
    """The bytes of each token of `tokenizer`. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def load(self) -> None:
        """Do now what the first token would take long for."""
        with self._lock:
            _ = self._vocabulary

    def bytes_of(self, token: int) -> bytes:
        """The bytes of `token`; of a special one, its name."""
        if self._vocabulary is None:
            return self._tokenizer.decode([token], skip_special=False).encode()
        return bytes(self._vocabulary.decode_bytes([token]))

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer | None:
        """None for a kind of tokenizer that does not tell: its decoder must do."""
        try:
            return llguidance.LLTokenizer(self._tokenizer.serialised())
        except ValueError:
            return None
