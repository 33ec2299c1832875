"""Gateways that come and go: connections to all of them, and sequences that survive the loss of one."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec

from gateway.link.client import GatewayClient, GatewayLostError
from gateway.messages import Delta, GatewayStatus, Submit

log = logging.getLogger(__name__)

_REFRESH_S = 2.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.25
_MOMENT_S = 0.25
"""What gateways that answer take to do so."""
_LOSSES = 3
"""A sequence that lost this many gateways in a row, without a token in between, may be what brings them down."""

Addresses = Callable[[], Awaitable[Sequence[str]]]
"""Lists the gateways there are, one address each."""


class GatewayPool:
    """Chooses a gateway for each sequence and moves the sequence when its gateway is lost.

    `patience_s` bounds how long a new sequence waits for a gateway, `loyalty_s` how long one that lost its own does,
    each time anew. An async context manager.
    """

    def __init__(
        self,
        addresses: Addresses,
        secret: bytes,
        fingerprint: str,
        *,
        patience_s: float = 30.0,
        loyalty_s: float = 300.0,
    ) -> None:
        self.patience_s = patience_s
        self.loyalty_s = loyalty_s
        self._addresses = addresses
        self._secret = secret
        self._fingerprint = fingerprint
        self._clients: dict[str, GatewayClient] = {}
        self._listed: Sequence[str] = ()
        self._refreshed = -_REFRESH_S
        self._failure = "no gateway is listed"
        self._closing = False
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._connecting: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> GatewayPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up on every gateway."""
        tasks = [*self._connecting.values(), *([self._refreshing] if self._refreshing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))
        self._clients.clear()

    @property
    def connected(self) -> int:
        """Gateways that answer."""
        return sum(client.alive for client in self._clients.values())

    async def client(self, patience_s: float | None = None) -> GatewayClient:
        """The connected gateway with the fewest sequences; raise GatewayLostError if none comes within the patience."""
        patience = self.patience_s if patience_s is None else patience_s
        deadline = time.monotonic() + patience
        pause = _FIRST_PAUSE_S
        while True:
            if self._closing:
                raise GatewayLostError("The server is shutting down.")
            if (client := self._choose()) is not None:
                self._refresh_beside()
                return client
            await self._refresh()
            if self._choose() is not None:
                continue
            if time.monotonic() + pause > deadline:
                raise GatewayLostError(f"No gateway answered within {patience:g} s: {self._failure}.")
            await asyncio.sleep(pause)  # not a hand-over: nobody tells us when a gateway starts elsewhere
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """Yield the sequence's deltas, every token once, whatever happens to the gateways meanwhile.

        Raise GatewayLostError when no gateway comes back within the patience, or none stands the sequence.
        """
        emitted = list(submit.emitted)
        ends = None if submit.deadline_s is None else time.monotonic() + submit.deadline_s
        attempts = losses = 0
        while True:
            attempts += 1
            # A fresh id: the gateway may not have noticed yet that the connection before this one is gone.
            attempt = msgspec.structs.replace(submit, request_id=f"{submit.request_id}~{attempts}", emitted=emitted)
            left = math.inf if ends is None else ends - time.monotonic()
            patience = self.patience_s if attempts == 1 else self.loyalty_s
            try:
                client = await self.client(min(patience, left))
            except GatewayLostError:
                if self._closing or left > patience:
                    raise
                yield _late(attempt)
                return
            if ends is not None:
                attempt = msgspec.structs.replace(attempt, deadline_s=ends - time.monotonic())
            try:
                async with aclosing(client.generate(attempt)) as deltas:
                    async for delta in deltas:
                        emitted.extend(delta.token_ids)
                        losses = 0
                        yield delta
                return
            except GatewayLostError as error:
                losses += 1
                if losses == _LOSSES:
                    raise GatewayLostError(f"The request was given up: {losses} gateways were lost. {error}") from error
                log.warning("%s Request %s moves on with %d tokens.", error, submit.request_id, len(emitted))

    def cut(self) -> None:
        """End every sequence, running or looking for a gateway, with an error; none starts any more."""
        self._closing = True
        for client in self._clients.values():
            client.end_all("The server is shutting down. The request can be sent again.", 503)

    async def status(self) -> list[GatewayStatus]:
        """Every connected gateway's counters; raise GatewayLostError where there is none at once."""
        await self.client(patience_s=0)
        answers = await asyncio.gather(*map(_status, list(self._clients.values())))
        return [answer for answer in answers if answer is not None]

    def _choose(self) -> GatewayClient | None:
        """Listed gateways first: one that left the list but still answers is draining."""
        alive = [client for client in self._clients.values() if client.alive]
        listed = [client for client in alive if client.address in self._listed]
        return min(listed or alive, key=lambda client: client.sequences, default=None)

    def _refresh_beside(self) -> None:
        """Look for changes now and then, without making a request wait for a directory that may hang."""
        idle = self._refreshing is None or self._refreshing.done()
        if idle and time.monotonic() - self._refreshed > _REFRESH_S:
            self._refreshing = asyncio.create_task(self._refresh(), name="gateways")

    async def _refresh(self) -> None:
        """Connect to new gateways and drop lost ones; whoever waited for another's refresh is content with that one."""
        async with self._lock:
            if time.monotonic() - self._refreshed < _FIRST_PAUSE_S:
                return
            await self._list()
            for address in [address for address, client in self._clients.items() if not client.alive]:
                await self._clients.pop(address).aclose()
            for address in self._listed:
                if address not in self._clients and address not in self._connecting:
                    self._connecting[address] = asyncio.create_task(self._connect(address), name=f"connect {address}")
            if self._connecting:  # one that hangs does not keep us from the others
                await asyncio.wait(self._connecting.values(), timeout=_MOMENT_S)
            while self._connecting and not self.connected:
                await asyncio.wait(self._connecting.values(), return_when=asyncio.FIRST_COMPLETED)
            self._refreshed = time.monotonic()

    async def _list(self) -> None:
        try:
            self._listed = await self._addresses()
        except Exception as error:  # whatever the directory's client raises: go on with the list we have
            self._failure = f"the list of gateways is unreadable ({error})"
            log.warning("the list of gateways is unreadable, going on with %d known: %s", len(self._listed), error)

    async def _connect(self, address: str) -> None:
        try:
            self._clients[address] = await GatewayClient.connect(address, self._secret, self._fingerprint)
        except OSError as error:
            self._failure = f"the gateway at {address} refused the connection ({str(error) or type(error).__name__})"
            log.info("%s", self._failure)
        finally:
            del self._connecting[address]


def _late(submit: Submit) -> Delta:
    sentence = "The request's deadline passed while there was no gateway for it."
    return Delta(request_id=submit.request_id, token_ids=[], finish_reason="error", error=sentence, error_status=504)


async def _status(client: GatewayClient) -> GatewayStatus | None:
    try:
        return await client.status()
    except GatewayLostError:
        return None
