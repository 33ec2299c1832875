"""The one thread that touches the engine: it steps while there is work and sleeps on its queue otherwise."""

from __future__ import annotations

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

from gateway.messages import Delta, Submit

log = logging.getLogger(__name__)

ENGINE_FAILED = "The gateway failed while it worked on this request. It can be sent again."


class Engine(Protocol):
    """What a gateway runs (`gateway.engine.Engine`); all calls but `prepare` come from one thread."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, submit: Submit) -> None:
        """Take a sequence in; raise ValueError, with one sentence for the client, where it can never run."""

    def prepare(self, submit: Submit) -> None:
        """Do ahead of `add`, in any thread, what takes time; raise what `add` would raise."""

    def cancel(self, request_id: str) -> None:
        """Drop a sequence and free what it holds; unknown ids are ignored."""

    def step(self) -> list[Delta]:
        """Advance every running sequence."""


Owner = TypeVar("Owner", bound=Hashable)


class EngineThread(Generic[Owner]):
    """Runs `engine`, after `prepare` (settings that belong to a thread, such as OpenMP's).

    `deliver` gets, once a step and in this thread, each owner's deltas of that step.
    `died` is called, in this thread too, when the engine raised where nothing can be saved: no step will follow.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[Mapping[Owner, list[Delta]]], None],
        died: Callable[[], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._died = died
        self._prepare = prepare
        self._owners: dict[str, Owner] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step under way, cancel what still runs, and end the thread."""
        self._commands.put(None)
        self._thread.join()
        self._preparing.shutdown(cancel_futures=True)

    def submit(self, owner: Owner, submit: Submit) -> None:
        """Start a sequence whose deltas go to `owner`."""
        self._commands.put(partial(self._take, owner, submit))

    def cancel(self, owner: Owner, request_id: str) -> None:
        """Stop a sequence of `owner`'s."""
        self._commands.put(partial(self._cancel, owner, request_id))

    def forget(self, owner: Owner) -> None:
        """Stop all sequences of `owner`'s: nobody reads them any more."""
        self._commands.put(partial(self._forget, owner))

    def _run(self) -> None:
        try:
            self._prepare()
            while self._obey():
                if self._engine.has_work:
                    self._publish(self._step())
            for request_id in self._owners:
                self._engine.cancel(request_id)
        except Exception:
            log.exception("the engine's thread ends: the engine cannot go on")
            self._died()

    def _obey(self) -> bool:
        """Carry out every command that is there, waiting for one when there is nothing else to do; False to stop."""
        wait = not self._engine.has_work
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _step(self) -> list[Delta]:
        try:
            return self._engine.step()
        except Exception:
            log.exception("a step of the engine failed: the requests it ran are given up")
            return [self._give_up(request_id) for request_id in self._owners]

    def _give_up(self, request_id: str) -> Delta:
        self._engine.cancel(request_id)
        return Delta(request_id=request_id, token_ids=[], finish_reason="error", error=ENGINE_FAILED)

    def _publish(self, deltas: list[Delta]) -> None:
        """Sort a step's deltas by owner and hand them over."""
        outputs: defaultdict[Owner, list[Delta]] = defaultdict(list)
        for delta in deltas:
            owner = self._owners.get(delta.request_id)
            if owner is not None:
                outputs[owner].append(delta)
            if delta.finish_reason is not None:
                self._owners.pop(delta.request_id, None)
        if outputs:
            self._deliver(outputs)

    def _take(self, owner: Owner, submit: Submit) -> None:
        """A grammar may take long to compile: others do not wait for it. Until then it can be cancelled already."""
        if submit.request_id in self._owners:
            self._refuse(owner, submit.request_id, f"The request id {submit.request_id!r} is in use.", 400)
            return
        self._owners[submit.request_id] = owner
        if submit.params.grammar is None:
            self._add(owner, submit)
            return
        preparing = self._preparing.submit(self._engine.prepare, submit)
        preparing.add_done_callback(lambda done: self._commands.put(partial(self._add, owner, submit, done)))

    def _add(self, owner: Owner, submit: Submit, prepared: Future[None] | None = None) -> None:
        if self._owners.get(submit.request_id) != owner:
            return
        try:
            if prepared is not None:
                prepared.result()
            self._engine.add(submit)
        except ValueError as error:
            self._refuse(owner, submit.request_id, str(error), 400)
        except Exception:
            log.exception("the engine failed to take request %s", submit.request_id)
            self._refuse(owner, submit.request_id, ENGINE_FAILED, 500)
        else:
            return
        del self._owners[submit.request_id]

    def _refuse(self, owner: Owner, request_id: str, error: str, status: int) -> None:
        delta = Delta(request_id=request_id, token_ids=[], finish_reason="error", error=error, error_status=status)
        self._deliver({owner: [delta]})

    def _cancel(self, owner: Owner, request_id: str) -> None:
        if self._owners.get(request_id) == owner:
            del self._owners[request_id]
            self._engine.cancel(request_id)

    def _forget(self, owner: Owner) -> None:
        for request_id in [request for request, theirs in self._owners.items() if theirs == owner]:
            self._cancel(owner, request_id)
