"""The api's end of the connection: one gateway, any number of sequences at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator

import msgspec

from gateway.link import framing
from gateway.link.framing import Link, LinkError
from gateway.messages import Cancel, Delta, GatewayStatus, StatusQuery, StepOutput, Submit

log = logging.getLogger(__name__)

SILENCE_S = 3.0
"""A gateway that shows no sign of life for so long counts as lost."""
_LOOKS = 3
"""In so many looks in a row, lest it is this process that was held up."""


class GatewayLostError(ConnectionError):
    """The gateway went away, or none is there; the message is one sentence."""


class GatewayClient:
    """A connection to one gateway. Made by `connect`; everything belongs to the event loop that made it."""

    def __init__(self, link: Link, address: str) -> None:
        self.address = address
        self._link = link
        self._lost: GatewayLostError | None = None
        self._sequences: dict[str, asyncio.Queue[Delta | GatewayLostError]] = {}
        self._queries: dict[int, asyncio.Future[GatewayStatus]] = {}
        self._query_ids = itertools.count(1)
        self._heard = True
        self._reader = asyncio.create_task(self._read(), name=f"gateway {address}")
        self._watcher = asyncio.create_task(self._watch(), name=f"watch gateway {address}")

    @classmethod
    async def connect(cls, address: str, secret: bytes, fingerprint: str, timeout_s: float = 5.0) -> GatewayClient:
        """Connect to ``unix:@NAME`` or ``tcp:HOST:PORT``; raise OSError (HandshakeError, TimeoutError among them)."""
        return cls(await Link.connect(address, secret, fingerprint, timeout_s), address)

    @property
    def alive(self) -> bool:
        """False once the gateway is lost or the client closed."""
        return self._lost is None

    @property
    def sequences(self) -> int:
        """Sequences under way."""
        return len(self._sequences)

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """Yield the sequence's deltas up to the one with a finish reason; raise GatewayLostError if the gateway goes.

        Closing the generator early, or cancelling the task that waits for it, cancels the sequence in the gateway.
        """
        if submit.request_id in self._sequences:
            raise ValueError(f"request id {submit.request_id!r} is in use")
        self._send(framing.pack(submit))
        deltas = self._sequences[submit.request_id] = asyncio.Queue()
        finished = False
        try:
            while not finished:
                delta = await deltas.get()
                if isinstance(delta, GatewayLostError):
                    raise delta
                finished = delta.finish_reason is not None
                yield delta
        finally:
            del self._sequences[submit.request_id]
            if not finished:
                with contextlib.suppress(GatewayLostError):
                    self._send(framing.pack(Cancel(request_id=submit.request_id)))

    def end_all(self, error: str, status: int) -> None:
        """End every sequence with an error for its client."""
        for request_id, sequence in self._sequences.items():
            sequence.put_nowait(
                Delta(request_id=request_id, token_ids=[], finish_reason="error", error=error, error_status=status)
            )
            with contextlib.suppress(GatewayLostError):
                self._send(framing.pack(Cancel(request_id=request_id)))

    async def status(self) -> GatewayStatus:
        """The gateway's counters; raise GatewayLostError."""
        query_id = next(self._query_ids)
        self._send(framing.pack(StatusQuery(query_id=query_id)))
        answer: asyncio.Future[GatewayStatus] = asyncio.get_running_loop().create_future()
        self._queries[query_id] = answer
        try:
            return await answer
        finally:
            del self._queries[query_id]

    async def aclose(self) -> None:
        """Hang up; whoever still waits gets GatewayLostError."""
        self._reader.cancel()
        self._watcher.cancel()
        await asyncio.gather(self._reader, self._watcher, return_exceptions=True)
        self._end("the connection was closed")
        await self._link.aclose()

    def _send(self, frame: bytes) -> None:
        if self._lost is not None:
            raise GatewayLostError(str(self._lost))
        try:
            self._link.send(frame)
        except LinkError as error:
            self._end(str(error))
            raise GatewayLostError(str(self._lost)) from error

    async def _read(self) -> None:
        reason = "it hung up"
        try:
            while (payload := await self._link.receive()) is not None:
                self._heard = True
                self._dispatch(payload)
        except (OSError, msgspec.DecodeError) as error:
            reason = str(error)
            log.warning("gateway at %s: %s", self.address, error)
        self._end(reason)
        self._link.abort()

    async def _watch(self) -> None:
        """Give up on a gateway whose process hangs: nothing else would ever tell."""
        silent = 0
        while silent < _LOOKS:
            await asyncio.sleep(SILENCE_S / _LOOKS)
            silent = 0 if self._heard else silent + 1
            self._heard = False
        self._end(f"no sign of life for {SILENCE_S:g} s")
        self._link.abort()

    def _dispatch(self, payload: bytes) -> None:
        match framing.from_gateway.decode(payload):
            case StepOutput(deltas=deltas):
                for delta in deltas:
                    if (sequence := self._sequences.get(delta.request_id)) is not None:
                        sequence.put_nowait(delta)
            case GatewayStatus() as status:
                if (query := self._queries.get(status.query_id)) is not None and not query.done():
                    query.set_result(status)

    def _end(self, reason: str) -> None:
        """Tell everybody who waits, once."""
        if self._lost is not None:
            return
        self._watcher.cancel()
        self._lost = GatewayLostError(f"The gateway at {self.address} was lost: {reason}.")
        for sequence in self._sequences.values():
            sequence.put_nowait(GatewayLostError(str(self._lost)))
        for query in self._queries.values():
            if not query.done():
                query.set_exception(GatewayLostError(str(self._lost)))
