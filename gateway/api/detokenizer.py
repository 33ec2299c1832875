"""Tokens to text, one at a time: what is given is never taken back, half a character is held until it is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
_LONGEST = 4
"""Bytes of a UTF-8 character, and so the tokens it can be spread over, at most."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, invalid UTF-8 to U+FFFD."""


class Detokenizer:
    """The text of one sequence; it depends on the tokens alone, not on how they were grouped.

    Only a window is decoded: the tokens of the last piece, which some decoders need in sight (they strip a leading
    space, or merge byte tokens), and those that follow it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0
        """Tokens at the start of the window that belong to the last piece."""
        self._given = 0
        """Characters of the window's text that were given."""

    def push(self, token: int) -> str:
        """The text that `token` completes; often one word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._hold_back(text)
        piece = text[self._given :]
        if piece:
            self._cut(self._window[self._context :])
        else:
            self._window.pop()  # a special token: the window needs it no more than the text does
        return piece

    @property
    def holding(self) -> bool:
        """Whether the last token's text, or a part of it, is still held back."""
        return len(self._window) > self._context

    def finish(self) -> str:
        """What was held back: nothing follows it."""
        return self._decode(self._window)[self._given :]

    def _hold_back(self, text: str) -> str:
        """`text` ends in what may become a character."""
        if len(self._window) - self._context <= _LONGEST:
            stable = text.rstrip(REPLACEMENT)
            piece, self._given = stable[self._given :], max(self._given, len(stable))
            return piece
        # More tokens than a character has bytes: all is invalid but the last, which may still begin one.
        piece = text[self._given : -1]
        self._cut(self._window[-_LONGEST:])
        self._context = 0
        self._given -= 1
        return piece

    def _cut(self, window: list[int]) -> None:
        self._window = window
        self._context = len(window)
        self._given = len(self._decode(window))
