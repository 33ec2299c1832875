"""Slices come and go as the plan wants: loaded before they are announced, kept for a grace, never beyond the room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from experts.errors import StoreError
from experts.residency import Residency, Slice, wanted
from placement.plan import Copy, Plan
from tests.waiting import eventually

UNIT = [(layer, expert) for expert in (4, 5) for layer in (1, 2)]


def plan(copies: dict[str, list[Copy]] | None) -> Plan:
    return Plan(epoch=1, replicas={}, copies=copies, reason="test")


def test_without_a_plan_or_its_word_a_replica_holds_its_whole_unit() -> None:
    assert wanted(None, "a", UNIT) == UNIT
    assert wanted(plan(None), "a", UNIT) == UNIT


def test_a_replica_holds_what_the_plan_gives_it_the_largest_share_first() -> None:
    given = {"a": [Copy(1, 4, 0.0), Copy(2, 5, 0.7), Copy(9, 9, 1.0), Copy(1, 5, 0.2)], "b": []}
    assert wanted(plan(given), "a", UNIT) == [(2, 5), (1, 5), (1, 4)]
    assert wanted(plan(given), "b", UNIT) == []


def test_a_replica_the_plan_does_not_know_yet_holds_nothing() -> None:
    assert wanted(plan({}), "new", UNIT) == []


class Weights:
    """Loads in no time; notes what is held."""

    def __init__(self) -> None:
        self.loaded: frozenset[Slice] = frozenset()
        self.most = 0
        self.broken: set[Slice] = set()
        self.gate = threading.Event()
        self.gate.set()

    def load(self, layer: int, expert: int) -> None:
        assert self.gate.wait(10)
        if (layer, expert) in self.broken:
            raise StoreError("damaged")
        self.loaded |= {(layer, expert)}
        self.most = max(self.most, len(self.loaded))

    def unload(self, slices: list[Slice]) -> None:
        self.loaded -= set(slices)


class Watched:
    """A residency, and all it announced."""

    def __init__(self, room: int = 0, grace_s: float = 0.3) -> None:
        self.weights = Weights()
        self.told: list[list[Slice]] = []
        self.residency = Residency(self.weights, 10, 10 * room, self.told.append, grace_s)  # type: ignore[arg-type]


def test_what_is_wanted_at_the_start_is_there_when_it_has_started() -> None:
    here = Watched()
    here.residency.want(UNIT)
    with here.residency:
        assert here.weights.loaded == set(UNIT)
        assert here.residency.slices == sorted(UNIT)


def test_a_slice_is_loaded_before_it_is_announced() -> None:
    here = Watched()
    here.weights.gate.clear()
    with here.residency:
        here.residency.want(UNIT[:1])
        time.sleep(0.05)
        assert here.told == []
        here.weights.gate.set()
        eventually(lambda: here.told == [UNIT[:1]])
        assert here.weights.loaded == set(UNIT[:1])


def test_a_slice_no_longer_wanted_is_told_at_once_and_released_after_a_grace() -> None:
    here = Watched()
    here.residency.want(UNIT)
    with here.residency:
        started = time.monotonic()
        here.residency.want(UNIT[:1])
        eventually(lambda: here.told[-1] == UNIT[:1])
        assert here.weights.loaded == set(UNIT)
        eventually(lambda: here.weights.loaded == set(UNIT[:1]))
        assert time.monotonic() - started >= 0.3


def test_a_slice_wanted_again_within_the_grace_is_not_loaded_again() -> None:
    here = Watched()
    here.residency.want(UNIT)
    with here.residency:
        here.residency.want([])
        eventually(lambda: here.told[-1] == [])
        here.weights.gate.clear()  # loading would hang
        here.residency.want(UNIT)
        eventually(lambda: here.told[-1] == sorted(UNIT))
        here.weights.gate.set()


def test_what_a_missing_call_loaded_goes_again() -> None:
    here = Watched()
    with here.residency:
        here.weights.load(1, 4)
        eventually(lambda: here.weights.loaded == frozenset())
        assert here.told == []


@pytest.mark.parametrize("room", [1, 2, 3])
def test_there_is_never_more_than_there_is_room_for(room: int) -> None:
    here = Watched(room, grace_s=5.0)
    here.residency.want(UNIT)
    with here.residency:
        assert here.residency.slices == sorted(UNIT[:room])
        here.residency.want(UNIT[::-1])
        eventually(lambda: here.told[-1] == sorted(UNIT[::-1][:room]), 3.0)  # well before the grace has passed
    assert here.weights.most == room


def test_a_damaged_slice_keeps_no_other_from_being_loaded() -> None:
    here = Watched()
    here.weights.broken = {UNIT[1]}
    here.residency.want(UNIT)
    with here.residency:
        assert here.residency.slices == sorted(set(UNIT) - {UNIT[1]})


def test_a_newer_wish_interrupts_the_loading_of_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Watched(grace_s=0.05)
    many = [(layer, 0) for layer in range(50)]
    load: Callable[[int, int], None] = here.weights.load

    def slowly(layer: int, expert: int) -> None:
        time.sleep(0.02)
        load(layer, expert)

    monkeypatch.setattr(here.weights, "load", slowly)
    with here.residency:
        here.residency.want(many)
        eventually(lambda: bool(here.told))
        here.residency.want([(99, 0)])
        eventually(lambda: here.told[-1] == [(99, 0)], 0.5)
        assert here.weights.most < 50
