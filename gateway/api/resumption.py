"""Answers that outlive their api process: a client that sends its request again, under the same ``Idempotency-Key``,
gets the answer from the beginning, as far as it went from the journal and then from a gateway.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from pydantic import BaseModel

from gateway.api.answer import Source
from gateway.api.errors import ApiError
from gateway.messages import Delta, Submit
from recovery.journal import Journal

HEADER = "idempotency-key"
_LONGEST = 255


class _Asked(msgspec.Struct, frozen=True):
    """What the journal keeps of one sequence."""

    body: str
    """Digest of the request's body."""
    submit: Submit


class ResumedSource:
    """The gateways as a request sees them that may have been under way before (`gateway.api.answer.Source`)."""

    def __init__(self, source: Source, journal: Journal, key: str, client: str | None, body: BaseModel) -> None:
        """`key` is the header's value, `client` the name of the API key; raise ApiError for a key that is none."""
        if not 0 < len(key) <= _LONGEST or not key.isprintable():
            raise ApiError(400, f"`Idempotency-Key` must have 1 to {_LONGEST} printable characters.")
        self._source = source
        self._journal = journal
        self._place = hashlib.sha256(f"{client or ''}\n{key}".encode()).hexdigest()
        self._body = hashlib.sha256(body.model_dump_json().encode()).hexdigest()

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """The sequence's deltas; those of an earlier time first, all in one. Raise ApiError for another body."""
        place = f"{self._place}-{submit.request_id.rpartition('-')[2]}"
        kept = await self._journal.find(place)
        if kept is not None:
            submit = self._resumed(submit, kept.asked, kept.tokens)
        asked = msgspec.msgpack.encode(_Asked(self._body, msgspec.structs.replace(submit, emitted=[])))
        if submit.emitted:
            yield Delta(request_id=submit.request_id, token_ids=submit.emitted)
        before = None if kept is None else kept.attempt
        with self._journal.entry(place, asked, submit.emitted, before) as entry:
            async with aclosing(self._source.generate(submit)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is None:  # its end is told with its last token, or not at all
                        entry.add(delta.token_ids)
                    yield delta

    def _resumed(self, submit: Submit, asked: bytes, tokens: list[int]) -> Submit:
        """With the seed of then. Log-probabilities are not kept: their tokens are generated once more, and alike."""
        try:
            before = msgspec.msgpack.decode(asked, type=_Asked)
        except msgspec.DecodeError:  # left by another release
            return submit
        if before.body != self._body:
            text = "This `Idempotency-Key` belongs to a request with another body, which was under way."
            raise ApiError(422, text, code="idempotency_key_reused")
        params = submit.params
        told = params.logprobs is not None or params.prompt_logprobs is not None
        return msgspec.structs.replace(submit, params=before.submit.params, emitted=[] if told else tokens)
