"""Which replicas may be given rows, as one gateway sees it: a state machine for each replica, pure.

joining -> ready -> suspect -> ready ... -> gone, and draining -> gone. Time is an argument, in seconds of any clock
that never goes back; nothing here reads one, or talks to anybody. Every change comes back as an `Event` with a reason.

Three sorts of observers feed it: the directory (`listed`), the data plane (`connected`, `answered`, `missed`, `lost`)
and Ray (`died`, `node_died`, `draining`). The data plane is the quickest and may be wrong; what it says can be taken
back. Ray is slow and right.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from recovery.latency import Latency

_REMEMBERED = 10_000
"""Replicas that are gone and known to be; the oldest are forgotten first."""
_TOLD = 1.25
"""A share has to change by this factor to be an event."""


class State(enum.StrEnum):
    """What a replica is good for."""

    JOINING = "joining"
    """Listed, not connected yet."""
    READY = "ready"
    SUSPECT = "suspect"
    """It failed a call, or something says that it may; it gets rows only where nobody else can compute them."""
    DRAINING = "draining"
    """About to end; treated like a suspect one."""
    GONE = "gone"
    """For good: another replica has another id."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How quickly trust is lost and won; seconds, unless they are factors."""

    quarantine_s: float = 0.25
    """What a replica is left alone after a failure; doubled by each further one."""
    longest_quarantine_s: float = 60.0
    forgive_s: float = 60.0
    """So long after its last quarantine a replica's failures are forgotten."""
    missing_s: float = 3.0
    """Absent from the directory for so long: suspect, and gone where it is not connected either. Redis may have been
    restarted empty, and everybody needs a moment to register again."""
    forget_s: float = 120.0
    """Absent for so long, it is gone, connected or not; Serve has replaced it by then."""
    slow_factor: float = 2.0
    """So many times slower than its peers, a replica gets a smaller share, in proportion ..."""
    least_share: float = 0.1
    stuck_factor: float = 8.0
    """... and so many times slower ..."""
    stuck_s: float = 5.0
    """... for so long, none for a while."""


@dataclass(frozen=True)
class Event:
    """One replica went from one state to another (`before` is None for a new one), or its share changed."""

    at: float
    replica: str
    before: State | None
    after: State
    share: float
    reason: str


@dataclass(frozen=True)
class Place:
    """Where a replica runs and what for."""

    unit: str
    node: str


@dataclass(eq=False, slots=True)
class _Member:
    place: Place
    state: State = State.JOINING
    connected: bool = False
    missing_since: float | None = None
    """When the directory was first seen without it."""
    strikes: int = 0
    struck_at: float = 0.0
    until: float = 0.0
    """End of its quarantine."""
    needs_sign: bool = False
    """Whether it has to show that it is alive before it is trusted again."""
    latency: Latency = field(default_factory=Latency)
    share: float = 1.0
    stuck_since: float | None = None


class Membership:
    """All replicas that one gateway knows of. Not thread-safe."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._members: dict[str, _Member] = {}
        self._gone: dict[str, None] = {}

    def state(self, replica: str) -> State | None:
        """Its state; None for one that was never heard of."""
        if (member := self._members.get(replica)) is not None:
            return member.state
        return State.GONE if replica in self._gone else None

    @property
    def states(self) -> dict[str, State]:
        """The state of every replica that is not gone."""
        return {name: member.state for name, member in self._members.items()}

    def usable(self, copies: Iterable[str], *, inline: bool) -> dict[str, float]:
        """Which of `copies` of a slice get rows: id -> factor on the share that it was planned to have, in (0, 1].

        None of them: the rows run inline. Without `inline` whoever is connected is better than nobody.
        """
        known = [(name, self._members[name]) for name in copies if name in self._members]
        ready = {name: member.share for name, member in known if member.state is State.READY}
        if ready or inline:
            return ready
        for state in (State.DRAINING, State.SUSPECT):
            if rest := {name: 1.0 for name, member in known if member.connected and member.state is state}:
                return rest
        return {}

    def deadline(self, replica: str, expected_s: float, limit_s: float) -> float:
        """Seconds after which a call that should take `expected_s` is hedged; `limit_s` where nothing is known yet."""
        member = self._members.get(replica)
        return limit_s if member is None else member.latency.deadline(expected_s, limit_s)

    def listed(self, entries: Mapping[str, Place], now: float) -> list[Event]:
        """The directory's list as it was read at `now`; a directory that can't be read says nothing."""
        events = []
        for name, place in entries.items():
            if name not in self._members and name not in self._gone:
                self._members[name] = _Member(place)
                events.append(Event(now, name, None, State.JOINING, 1.0, "it is in the directory"))
        for name, member in self._members.items():
            if name in entries:
                member.missing_since = None
            elif member.missing_since is None:
                member.missing_since = now
        return events + self.tick(now)

    def connected(self, replica: str, now: float) -> list[Event]:
        """A connection to it stands."""
        if (member := self._members.get(replica)) is None:
            return []
        member.connected, member.needs_sign = True, False
        if member.state is State.JOINING:
            return [self._move(replica, State.READY, "it is connected", now)]
        return self._readmit(replica, member, now)

    def answered(self, replica: str, seconds: float, expected_s: float, now: float) -> list[Event]:
        """It answered a call, which should have taken `expected_s`, in `seconds`, late or not."""
        if (member := self._members.get(replica)) is None:
            return []
        member.latency.observe(seconds, expected_s)
        if member.state is not State.SUSPECT:
            return []
        member.needs_sign = False
        return self._readmit(replica, member, now)

    def missed(self, replica: str, now: float, reason: str = "it missed a deadline") -> list[Event]:
        """A call was not answered in time; the connection stands."""
        member = self._members.get(replica)
        return [] if member is None else self._suspect(replica, member, reason, now)

    def lost(self, replica: str, now: float, reason: str) -> list[Event]:
        """There is no connection to it (any more)."""
        if (member := self._members.get(replica)) is None:
            return []
        member.connected = False
        if member.state is State.DRAINING:
            return [self._move(replica, State.GONE, f"it ended: {reason}", now)]
        return self._suspect(replica, member, reason, now)

    def draining(self, replica: str, now: float, reason: str) -> list[Event]:
        """It was told to end."""
        member = self._members.get(replica)
        if member is None or member.state is State.DRAINING:
            return []
        return [self._move(replica, State.DRAINING, reason, now)]

    def died(self, replica: str, now: float, reason: str) -> list[Event]:
        """Somebody knows that it is dead, even before it is listed."""
        if replica in self._members:
            return [self._move(replica, State.GONE, reason, now)]
        self._bury(replica)
        return []

    def node_died(self, node: str, now: float, reason: str) -> list[Event]:
        """Everything on that node is dead."""
        there = [name for name, member in self._members.items() if member.place.node == node]
        return [self._move(name, State.GONE, reason, now) for name in there]

    def tick(self, now: float) -> list[Event]:
        """What time alone brings: ends of quarantines, the missing, the slow. A few times a second will do."""
        events = []
        for name, member in list(self._members.items()):
            events += self._miss(name, member, now)
            if name in self._members:
                events += self._readmit(name, member, now)
        return events + self._weigh(now)

    def _miss(self, name: str, member: _Member, now: float) -> list[Event]:
        if member.missing_since is None:
            return []
        absent = now - member.missing_since
        if absent < self.rules.missing_s:
            return []
        if not member.connected or absent >= self.rules.forget_s:
            return [self._move(name, State.GONE, f"it has been out of the directory for {absent:.0f} s", now)]
        return self._suspect(name, member, "its lease ran out, though it is connected", now, needs_sign=False)

    def _suspect(self, name: str, member: _Member, reason: str, now: float, *, needs_sign: bool = True) -> list[Event]:
        if member.state is not State.READY:
            member.needs_sign |= needs_sign and member.state is State.SUSPECT
            return []
        if now - member.until > self.rules.forgive_s:
            member.strikes = 0
        member.strikes, member.struck_at = member.strikes + 1, now
        quarantine = min(self.rules.quarantine_s * 2.0 ** (member.strikes - 1), self.rules.longest_quarantine_s)
        member.until, member.needs_sign = now + quarantine, needs_sign
        return [self._move(name, State.SUSPECT, f"{reason}: left alone for {quarantine:g} s at least", now)]

    def _readmit(self, name: str, member: _Member, now: float) -> list[Event]:
        if member.state is not State.SUSPECT or not member.connected or member.needs_sign:
            return []
        if now < member.until or member.missing_since is not None:
            return []
        member.stuck_since = None
        return [self._move(name, State.READY, f"it is well again after {now - member.struck_at:.2g} s", now)]

    def _weigh(self, now: float) -> list[Event]:
        """Compare the ready ones with each other and let the slow have less."""
        paces = {
            name: pace
            for name, member in self._members.items()
            if member.state is State.READY and (pace := member.latency.pace) is not None
        }
        events = []
        for name, pace in paces.items():
            others = [other for peer, other in paces.items() if peer != name]
            events += self._weighed(name, pace / max(statistics.median(others), 1e-9) if others else 1.0, now)
        return events

    def _weighed(self, name: str, slowness: float, now: float) -> list[Event]:
        member, rules = self._members[name], self.rules
        if slowness < rules.stuck_factor:
            member.stuck_since = None
        elif member.stuck_since is None:
            member.stuck_since = now
        elif now - member.stuck_since >= rules.stuck_s:
            member.latency, member.share = Latency(), rules.least_share
            reason = f"it takes {slowness:.0f} times as long as its peers"
            return self._suspect(name, member, reason, now, needs_sign=False)
        share = 1.0 if slowness < rules.slow_factor else max(1.0 / slowness, rules.least_share)
        if member.share / _TOLD < share < member.share * _TOLD and (share == 1.0) == (member.share == 1.0):
            return []
        member.share = share
        reason = f"it takes {slowness:.1f} times as long as its peers"
        return [Event(now, name, member.state, member.state, share, reason)]

    def _move(self, name: str, state: State, reason: str, now: float) -> Event:
        member = self._members[name]
        event = Event(now, name, member.state, state, member.share, reason)
        member.state = state
        if state is State.GONE:
            del self._members[name]
            self._bury(name)
        return event

    def _bury(self, name: str) -> None:
        self._gone[name] = None
        while len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
