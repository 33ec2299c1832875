"""Plays a scenario against a running service and reports what clients noticed."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recovery.chaos.deeds import check_device, done
from recovery.chaos.load import Answer, Load
from recovery.chaos.scenario import Moment, Scenario
from recovery.chaos.service import Service, Target

_WATCH_S = 8.0
"""So long after an event a gap between tokens may be its doing, unless another event comes before."""
_SOON_S = 0.25
_LOOK_S = 0.25


@dataclass
class Happening:
    """An event as it came; seconds are counted from the beginning of the load."""

    at: float
    what: str
    hit: list[str]
    killed: list[int]
    """Processes; none of them is there any more when all is whole again."""
    gap_s: float = 0.0
    """The longest that a client who waited for its next token at that moment, or began to soon after, had to wait."""
    longest_gap_s: float = 0.0
    """The longest wait of all behind the event: that of processes that start again beside the others, too."""
    whole_after_s: float | None = None
    """Until everything that is planned was there again, looked at from outside; None: not before the end."""


@dataclass
class Outcome:
    """What a scenario came to."""

    scenario: dict[str, Any]
    seconds: float
    requests: int
    errors: list[str]
    changed: int
    """Answers that differ from the undisturbed one."""
    tokens: int
    gap_p50_s: float
    gap_p99_s: float
    longest_gap_s: float
    whole: bool
    happenings: list[Happening] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No error, no changed token, and whole at the end."""
        return not self.errors and not self.changed and self.whole

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {**asdict(self), "passed": self.passed}


def play(scenario: Scenario, service: Service, expected: Sequence[str] = ()) -> Outcome:
    """Play it; raise ScenarioError, before anything is broken, for what can't be done here.

    `expected` are the load's undisturbed answers, where they are known.
    """
    for event in scenario.events:
        check_device(event)
        service.check(event)
    load = Load(service.url, service.model, scenario.load, expected)
    load.undisturbed()
    happenings: list[Happening] = []
    began = time.monotonic()
    with _watched(service, happenings, began), contextlib.ExitStack() as lasting:
        with load:
            for moment in scenario.schedule():
                _sleep_until(began + moment.at)
                happenings.append(_hit(moment, service, lasting, began))
            _sleep_until(began + scenario.seconds)
            lasting.close()
        ended = time.monotonic()
        while not (whole := service.whole()) and time.monotonic() < ended + scenario.settle:
            time.sleep(_LOOK_S)
        time.sleep(2 * _LOOK_S)  # for whoever watches
    return outcome_of(scenario, load.answers, happenings, began, ended, whole)


def _hit(moment: Moment, service: Service, lasting: contextlib.ExitStack, began: float) -> Happening:
    event = moment.event
    targets = _chosen(service.targets(event), event.count, moment.draw) if event.do != "partition" else []
    deed = contextlib.ExitStack()
    at = time.monotonic() - began
    deed.enter_context(done(event, targets, moment.draw))
    if event.do in ("stop", "slow", "partition"):
        timer = threading.Timer(event.seconds, deed.close)
        timer.start()
        lasting.callback(_end, timer, deed)
    else:
        deed.close()
    killed = [target.pid for target in targets] if event.do == "kill" else []
    return Happening(at, f"{event.do} {event.to or event.device}", [f"{t.name} ({t.pid})" for t in targets], killed)


def _end(timer: threading.Timer, deed: contextlib.ExitStack) -> None:
    timer.cancel()
    timer.join()
    deed.close()


def _chosen(targets: list[Target], count: int | str, draw: float) -> list[Target]:
    """`count` of them in a row, from one that the draw decides."""
    if count == "all" or not targets:
        return targets
    first = int(draw * len(targets))
    return [targets[(first + i) % len(targets)] for i in range(min(int(count), len(targets)))]


@contextlib.contextmanager
def _watched(service: Service, happenings: list[Happening], began: float) -> Iterator[None]:
    """Notes when the service is whole again after each event."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            waiting = [happening for happening in happenings if happening.whole_after_s is None]
            asked = time.monotonic() - began
            if waiting and service.whole():
                there = service.pids()
                for happening in waiting:
                    # The report may be older than the deed, and know processes that are dead.
                    if happening.at + 2 * _LOOK_S < asked and not there.intersection(happening.killed):
                        happening.whole_after_s = round(asked - happening.at, 2)

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def outcome_of(
    scenario: Scenario, answers: list[Answer], happenings: list[Happening], began: float, ended: float, whole: bool
) -> Outcome:
    """What clients noticed between `began` and `ended`."""
    gaps = [  # (end of the gap, its length)
        (after - began, after - before)
        for answer in answers
        for before, after in zip([answer.began, *answer.times], answer.times, strict=False)
    ]
    lengths = sorted(length for _, length in gaps) or [0.0]
    starts = [happening.at for happening in happenings]
    for happening, following in zip(happenings, [*starts, math.inf][1:], strict=True):
        until = min(happening.at + _WATCH_S, max(following, happening.at + 0.1))
        mine = [length for end, length in gaps if end > happening.at and end - length < until]
        soon = [length for end, length in gaps if end > happening.at and end - length < happening.at + _SOON_S]
        happening.gap_s = round(max(soon, default=0.0), 4)
        happening.longest_gap_s = round(max(mine, default=0.0), 4)
    return Outcome(
        scenario=scenario.model_dump(),
        seconds=round(ended - began, 2),
        requests=len(answers),
        errors=[answer.error for answer in answers if answer.error is not None],
        changed=sum(answer.changed for answer in answers),
        tokens=sum(len(answer.times) for answer in answers),
        gap_p50_s=lengths[len(lengths) // 2],
        gap_p99_s=lengths[int(0.99 * (len(lengths) - 1))],
        longest_gap_s=lengths[-1],
        whole=whole,
        happenings=happenings,
    )


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0.0))
