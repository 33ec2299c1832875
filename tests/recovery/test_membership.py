"""The state machine of replicas: examples, and what holds after any history."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.latency import Latency
from recovery.membership import Event, Membership, Place, Rules, State

HERE = Place("expert-0", "node-1")
NAMES = ("a", "b", "c")
RULES = Rules()


def ready(*names: str) -> Membership:
    """Replicas that are listed and connected at time 0."""
    members = Membership()
    members.listed(dict.fromkeys(names, HERE), 0.0)
    for name in names:
        members.connected(name, 0.0)
    return members


def told(events: list[Event]) -> list[tuple[str, State | None, State]]:
    return [(event.replica, event.before, event.after) for event in events]


def test_a_replica_joins_when_it_is_listed_and_is_used_when_it_is_connected() -> None:
    members = Membership()
    assert told(members.listed({"a": HERE}, 0.0)) == [("a", None, State.JOINING)]
    assert members.usable(["a"], inline=True) == {}
    assert told(members.connected("a", 0.1)) == [("a", State.JOINING, State.READY)]
    assert members.usable(["a", "stranger"], inline=True) == {"a": 1.0}


def test_a_replica_that_misses_a_deadline_is_left_alone_until_it_answers() -> None:
    members = ready("a", "b")
    [event] = members.missed("a", 1.0)
    assert (event.before, event.after) == (State.READY, State.SUSPECT)
    assert "deadline" in event.reason
    assert members.usable(["a", "b"], inline=True) == {"b": 1.0}
    assert members.tick(100.0) == []  # time alone proves nothing
    assert told(members.answered("a", 99.0, 0.001, 100.0)) == [("a", State.SUSPECT, State.READY)]


def test_a_late_answer_within_the_quarantine_is_a_sign_for_its_end() -> None:
    members = ready("a")
    members.missed("a", 1.0)
    assert members.answered("a", 0.05, 0.001, 1.05) == []
    assert told(members.tick(1.0 + RULES.quarantine_s)) == [("a", State.SUSPECT, State.READY)]


def test_a_lost_connection_has_to_stand_again() -> None:
    members = ready("a")
    members.lost("a", 1.0, "end of file")
    members.answered("a", 0.01, 0.01, 1.5)
    assert members.tick(2.0) == []
    assert told(members.connected("a", 2.0)) == [("a", State.SUSPECT, State.READY)]


def test_who_flaps_is_left_alone_twice_as_long_each_time_and_forgiven_in_the_end() -> None:
    members, now = ready("a"), 0.0
    for expected in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        lost_at = now
        members.lost("a", now, "end of file")
        members.connected("a", now)
        while members.state("a") is not State.READY:
            now += 0.125
            members.tick(now)
        assert now - lost_at == expected
    now += RULES.forgive_s + 1
    members.missed("a", now)
    members.answered("a", 1.0, 1.0, now)
    assert told(members.tick(now + RULES.quarantine_s)) == [("a", State.SUSPECT, State.READY)]


def test_a_directory_that_was_emptied_takes_nobody_out_of_service_at_once() -> None:
    members = ready("a", "b")
    assert members.listed({}, 60.0) == []
    assert members.listed({}, 60.0 + 0.9 * RULES.missing_s) == []
    assert members.listed({"a": HERE, "b": HERE}, 60.0 + RULES.missing_s) == []
    assert members.usable(["a", "b"], inline=True) == {"a": 1.0, "b": 1.0}


def test_a_lease_that_ran_out_costs_the_trust_and_in_the_end_the_place() -> None:
    members = ready("a")
    members.listed({}, 1.0)
    assert told(members.tick(1.0 + RULES.missing_s)) == [("a", State.READY, State.SUSPECT)]
    members.answered("a", 0.01, 0.01, 5.0)
    assert members.tick(10.0) == []
    assert told(members.listed({"a": HERE}, 11.0)) == [("a", State.SUSPECT, State.READY)]
    members.listed({}, 20.0)
    members.tick(21.0 + RULES.missing_s)
    assert told(members.tick(20.0 + RULES.forget_s)) == [("a", State.SUSPECT, State.GONE)]


def test_neither_listed_nor_connected_is_gone() -> None:
    members = ready("a")
    members.lost("a", 1.0, "end of file")
    members.listed({}, 2.0)
    assert told(members.tick(2.0 + RULES.missing_s)) == [("a", State.SUSPECT, State.GONE)]


def test_the_dead_stay_dead_however_often_they_are_listed() -> None:
    members = ready("a")
    assert told(members.died("a", 1.0, "its process ended")) == [("a", State.READY, State.GONE)]
    members.died("b", 1.0, "its process ended")
    assert members.listed({"a": HERE, "b": HERE}, 2.0) == []
    assert members.connected("a", 2.0) == []
    assert members.usable(["a", "b"], inline=False) == {}


def test_a_node_takes_its_replicas_with_it() -> None:
    members = Membership()
    members.listed({"a": HERE, "b": Place("expert-1", "node-2"), "c": HERE}, 0.0)
    assert {event.replica for event in members.node_died("node-1", 1.0, "no heartbeat")} == {"a", "c"}
    assert members.states == {"b": State.JOINING}


def test_a_draining_replica_gets_no_rows_and_its_end_is_no_surprise() -> None:
    members = ready("a", "b")
    members.draining("a", 1.0, "the plan has one replica less")
    assert members.usable(["a", "b"], inline=True) == {"b": 1.0}
    assert told(members.lost("a", 2.0, "end of file")) == [("a", State.DRAINING, State.GONE)]


def test_where_the_gateway_may_not_compute_the_last_copies_are_used_in_the_order_of_trust() -> None:
    members = ready("a", "b")
    members.missed("a", 1.0)
    members.draining("b", 1.0, "it ends")
    assert members.usable(["a", "b"], inline=False) == {"b": 1.0}
    assert members.usable(["a"], inline=False) == {"a": 1.0}
    assert members.usable(["a"], inline=True) == {}
    members.lost("a", 2.0, "end of file")
    assert members.usable(["a"], inline=False) == {}


def answer(members: Membership, slowness: dict[str, float], now: float, times: int = 64) -> None:
    for name, factor in slowness.items():
        for _ in range(times):
            members.answered(name, factor * 0.001, 0.001, now)


def test_a_slow_replica_loses_its_share_first_and_its_place_later() -> None:
    members = ready("a", "b", "c")
    answer(members, {"a": 4.0, "b": 1.0, "c": 1.1}, 1.0)
    [event] = members.tick(1.0)
    assert event.replica == "a"
    assert event.after is State.READY
    assert members.usable(NAMES, inline=True)["a"] == pytest.approx(0.25, rel=0.2)
    answer(members, {"a": 50.0}, 2.0)
    members.tick(2.0)
    assert members.usable(NAMES, inline=True)["a"] == RULES.least_share
    [event] = members.tick(2.0 + RULES.stuck_s)
    assert event.after is State.SUSPECT
    assert "times as long" in event.reason
    assert "a" not in members.usable(NAMES, inline=True)
    assert told(members.tick(3.0 + RULES.stuck_s)) == [("a", State.SUSPECT, State.READY)]  # on trial
    assert members.usable(NAMES, inline=True)["a"] == RULES.least_share
    answer(members, {"a": 1.0}, 9.0)
    members.tick(9.0)
    assert members.usable(NAMES, inline=True)["a"] == 1.0


def test_all_slow_alike_is_nobodys_fault() -> None:
    members = ready("a", "b", "c")
    answer(members, dict.fromkeys(NAMES, 30.0), 1.0)
    assert members.tick(100.0) == []


def test_a_deadline_follows_what_the_replica_took_lately() -> None:
    members = ready("a")
    assert members.deadline("a", 0.002, 10.0) == 10.0
    answer(members, {"a": 2.0}, 1.0)
    usual = 2.0 * 0.002
    assert usual < members.deadline("a", 0.002, 10.0) <= 4 * usual + 0.02
    answer(members, {"a": 20.0}, 2.0)
    assert members.deadline("a", 0.002, 10.0) > 10 * usual
    assert members.deadline("a", 1.0, 10.0) == 10.0


@given(st.lists(st.floats(1e-6, 1e3), min_size=8, max_size=200), st.floats(1e-6, 10.0), st.floats(1e-3, 60.0))
def test_a_deadline_is_never_above_its_limit_nor_below_what_is_usual(
    calls: list[float], expected: float, limit: float
) -> None:
    latency = Latency()
    for seconds in calls:
        latency.observe(seconds * expected, expected)
    pace = latency.pace
    assert pace is not None
    assert 0 < latency.deadline(expected, limit) <= limit
    assert latency.deadline(expected, limit) >= min(limit, pace * expected)


Deed = Callable[[Membership, float], list[Event]]
names = st.sampled_from(NAMES)
deeds = st.one_of(
    st.builds(
        lambda there: lambda m, t: m.listed({n: Place("expert-0", f"node-{n}") for n in there}, t), st.sets(names)
    ),
    st.builds(lambda n: lambda m, t: m.connected(n, t), names),
    st.builds(lambda n: lambda m, t: m.missed(n, t), names),
    st.builds(lambda n: lambda m, t: m.lost(n, t, "end of file"), names),
    st.builds(lambda n: lambda m, t: m.draining(n, t, "told to"), names),
    st.builds(lambda n, k, s: lambda m, t: [e for _ in range(k) for e in m.answered(n, s, 0.01, t)],
              names, st.integers(1, 20), st.floats(1e-4, 10.0)),
    st.just(lambda m, t: m.tick(t)),
)  # fmt: skip
rare = st.one_of(
    st.builds(lambda n: lambda m, t: m.died(n, t, "killed"), names),
    st.builds(lambda n: lambda m, t: m.node_died(f"node-{n}", t, "no heartbeat"), names),
)
steps = st.lists(st.tuples(st.one_of(*[deeds] * 9, rare), st.floats(0.0, 20.0)), max_size=60)
ALLOWED = {
    None: {State.JOINING},
    State.JOINING: {State.READY, State.DRAINING, State.GONE},
    State.READY: {State.READY, State.SUSPECT, State.DRAINING, State.GONE},
    State.SUSPECT: {State.READY, State.DRAINING, State.GONE},
    State.DRAINING: {State.GONE},
}


@settings(max_examples=400, deadline=None)
@given(steps)
def test_whatever_happens_the_history_makes_sense(history: list[tuple[Deed, float]]) -> None:
    members, now = Membership(), 0.0
    states: dict[str, State | None] = dict.fromkeys(NAMES)
    dead: set[str] = set()
    struck: dict[str, float] = {}
    for deed, pause in history:
        now += pause
        for event in deed(members, now):
            assert event.at == now
            assert event.reason
            assert event.before == states[event.replica], "no transition is kept secret"
            assert event.after in ALLOWED[event.before]
            if event.after is State.SUSPECT:
                struck[event.replica] = now
            if event.before is State.SUSPECT and event.after is State.READY:
                assert now - struck[event.replica] >= RULES.quarantine_s
            states[event.replica] = event.after
        dead |= {name for name in NAMES if members.state(name) is State.GONE}
        for name in NAMES:
            assert members.state(name) == (State.GONE if name in dead else states[name])
        with_inline, without = members.usable(NAMES, inline=True), members.usable(NAMES, inline=False)
        assert all(members.state(name) is State.READY for name in with_inline)
        assert not dead & without.keys()
        assert all(RULES.least_share <= share <= 1 for share in without.values())
        if with_inline:
            assert without == with_inline


@settings(max_examples=200, deadline=None)
@given(steps)
def test_suspicion_never_takes_the_last_copy_from_a_gateway_that_may_not_compute(
    history: list[tuple[Deed, float]],
) -> None:
    members, now = ready(*NAMES), 0.0
    for deed, pause in history:
        now += pause
        deed(members, now)
        members.listed({name: HERE for name in NAMES if members.state(name) is not State.GONE}, now)
        alive = members.states
        for name in alive:
            members.connected(name, now)
        assert bool(members.usable(NAMES, inline=False)) == bool(alive)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_who_behaves_again_is_trusted_again(history: list[tuple[Deed, float]]) -> None:
    members, now = ready(*NAMES), 0.0
    for deed, pause in history:
        now += pause
        deed(members, now)
    well = {name: HERE for name, state in members.states.items() if state is not State.DRAINING}
    for _ in range(200):
        now += 1.0
        members.listed(well, now)
        for name in well:
            members.connected(name, now)
            answer(members, {name: 1.0}, now, times=8)
    assert members.usable(NAMES, inline=True) == dict.fromkeys(well, 1.0)
