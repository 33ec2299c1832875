"""Parameters that clients may send and this server does not serve: refused by name, never ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.api.errors import invalid

_NOTHING: tuple[Any, ...] = (None, [], {}, "")
_NO = (None, False)
_ONE = (None, 1, 1.0)

_BOTH: dict[str, tuple[Any, ...]] = {
    "length_penalty": _ONE,
    "prompt_logprobs": (None,),
    "use_beam_search": _NO,
    "include_stop_str_in_output": _NO,
    "bad_words": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "truncate_prompt_tokens": (None,),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
}
COMPLETION: Mapping[str, tuple[Any, ...]] = _BOTH | {
    "suffix": (None, ""),
    "prompt_embeds": (None,),
}
CHAT: Mapping[str, tuple[Any, ...]] = _BOTH | {
    "best_of": _ONE,
    "echo": _NO,
    "tools": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": _NOTHING,
    "chat_template": (None,),
    "documents": _NOTHING,
    "continue_final_message": _NO,
    "web_search_options": (None,),
}
"""Parameter -> the values that ask for nothing, and are therefore accepted."""


def refuse(extra: Mapping[str, Any] | None, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise an ApiError for the first parameter of `extra` that asks for what is not served."""
    for name, value in (extra or {}).items():
        if name in neutral and not any(type(value) is type(other) and value == other for other in neutral[name]):
            raise invalid(name, f"`{name}` is not supported by this server: leave it out.", "unsupported_parameter")
