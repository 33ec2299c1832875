"""Grammars a text must keep to (``response_format``), by llguidance: for each step the tokens that are allowed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from pathlib import Path

import llguidance
import numpy as np
import numpy.typing as npt
import torch

from gateway.request_check import RequestError

_KEPT = 128
"""Compiled grammars that are kept for the next request with the same."""


class GrammarError(RequestError):
    """A grammar that cannot be used; the message is for the client."""


class GrammarState:
    """Where one sequence stands in its grammar. Brought up to date step by step."""

    def __init__(self, matcher: llguidance.LLMatcher, prompt_length: int) -> None:
        self._matcher = matcher
        self._seen = prompt_length

    def catch_up(self, tokens: list[int]) -> None:
        """Take in what was appended to the sequence's `tokens` since the last time."""
        self._matcher.consume_tokens(tokens[self._seen :])
        self._seen = len(tokens)

    @property
    def failure(self) -> str | None:
        """Why there is no way on (the grammar grew too complex, say): one sentence, or None."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().strip().splitlines()[0]
        return f"The text could not be kept to its `response_format` ({reason}); the request was ended."

    @property
    def complete(self) -> bool:
        """The grammar is satisfied and nothing can follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_]:
        """[vocabulary]: whether each token may come next; with a failure none may."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.zeros(vocabulary, dtype=np.bool_)
        return np.unpackbits(words, count=vocabulary, bitorder="little").view(np.bool_)


class Grammars:
    """Compiles grammars for the tokenizer in the folder `store`. Safe to use from several threads.

    The tokenizer is read when the first grammar comes: most gateways never see one.
    """

    def __init__(self, store: Path, vocabulary: int) -> None:
        self._store = store
        self._vocabulary = vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        """Held for moments only: whoever starts a compiled grammar never waits for another to be compiled."""

    def start(self, grammar: str, prompt_length: int) -> GrammarState:
        """The beginning of `grammar`, compiled now if it was not before; raise GrammarError."""
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy(), prompt_length)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._store, self._vocabulary)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"`response_format` can't be used: {matcher.get_error().strip()}.")
        return matcher


def mask(logits: torch.Tensor, rows: Seq[int], grammars: Seq[GrammarState]) -> None:
    """Forbid in place, in each of `rows` of `logits` [S, vocabulary], what its grammar does not allow."""
    allowed = np.stack([grammar.allowed(logits.shape[-1]) for grammar in grammars])
    index = torch.tensor(rows, device=logits.device)
    forbidden = torch.from_numpy(~allowed).to(logits.device)
    logits[index] = logits[index].masked_fill_(forbidden, float("-inf"))


def _load_tokenizer(store: Path, vocabulary: int) -> llguidance.LLTokenizer:
    from gateway.api.served_model import ApiConfig, ServedModel

    model = ServedModel.load(ApiConfig(store=store, model_name=""))
    text, size = model.tokenizer.serialised(), max(vocabulary, model.tokenizer.size)
    try:
        return llguidance.LLTokenizer(text, n_vocab=size, eos_token=list(model.eos_token_ids) or None)
    except ValueError as error:
        raise GrammarError(f"`response_format` is not possible with this model's tokenizer: {error}.") from error
