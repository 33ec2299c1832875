"""Going away with manners: new requests are refused, running ones finish, and who is too late is told so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from gateway.api.errors import ApiError

log = logging.getLogger(__name__)

CUT_S = 3.0
"""What a request that was cut has to send its last words."""


class Drain:
    """Counts the requests of one api process."""

    def __init__(self) -> None:
        self.draining = False
        """New requests are refused."""
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """The context of a request; raise a 503 where it comes too late."""
        if self.draining:
            raise ApiError(
                503,
                "The server is shutting down. The request can be sent again.",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finish(self, limit_s: float, cut: Callable[[], None]) -> None:
        """Return once no request runs; those that do after `limit_s` seconds are ended by `cut`."""
        self.draining = True
        if self._running:
            log.warning("shutting down: %d requests have %g s to finish", self._running, limit_s)
        if not await self._wait(limit_s):
            log.warning("shutting down: %d requests are cut", self._running)
            cut()
            await self._wait(CUT_S)

    async def _wait(self, seconds: float) -> bool:
        if not self._running:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
