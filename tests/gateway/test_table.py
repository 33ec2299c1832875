"""Which replicas get a slice's rows, as plan and directory together say."""

from __future__ import annotations

from gateway.table import DispatchTable, Link
from placement.plan import Copy, Plan
from recovery.directory import ReplicaEntry

HOT, COLD = (3, 0), (3, 1)


def table(resident: dict[str, list[tuple[int, int]]], copies: dict[str, list[Copy]] | None) -> DispatchTable:
    links = {}
    for name, slices in resident.items():
        entry = ReplicaEntry(
            id=name, unit="u", pid=1, node="n", host="h", addresses=[], experts=[0, 1], layers=[3], fingerprint="f",
            slices=slices,
        )  # fmt: skip
        links[name] = Link(entry, channel=None)  # type: ignore[arg-type]
    return DispatchTable.of(links, Plan(epoch=5, replicas={}, copies=copies, reason="test"))


def shares(found: DispatchTable, slice_: tuple[int, int]) -> dict[str, float]:
    holders = found.holders(*slice_)
    begins = (0.0, *holders.edges)
    return {
        link.entry.id: round(end - begin, 6)
        for link, begin, end in zip(holders.replicas, begins, holders.edges, strict=False)
    }


def test_without_a_word_of_the_plan_rows_are_spread_evenly_over_who_is_resident() -> None:
    found = table({"a": [HOT], "b": [HOT, COLD]}, None)
    assert shares(found, HOT) == {"a": 0.5, "b": 0.5}
    assert shares(found, COLD) == {"b": 1.0}
    assert found.epoch == 5


def test_rows_go_by_share_to_whom_the_plan_names_and_who_is_resident() -> None:
    planned = {"a": [Copy(*HOT, 0.5)], "b": [Copy(*HOT, 0.3)], "c": [Copy(*HOT, 0.2)]}
    assert shares(table({"a": [HOT], "b": [HOT], "c": [HOT]}, planned), HOT) == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert shares(table({"a": [HOT], "b": [], "c": [HOT]}, planned), HOT) == {"a": 0.714286, "c": 0.285714}


def test_what_the_plan_takes_from_a_replica_goes_elsewhere_although_it_is_still_resident() -> None:
    assert shares(table({"a": [HOT], "b": [HOT]}, {"b": [Copy(*HOT, 1.0)]}), HOT) == {"b": 1.0}


def test_reserve_copies_serve_where_nobody_with_a_share_is_resident() -> None:
    planned = {"a": [Copy(*HOT, 1.0)], "b": [Copy(*HOT, 0.0)]}
    assert shares(table({"a": [HOT], "b": [HOT]}, planned), HOT) == {"a": 1.0}
    assert shares(table({"a": [], "b": [HOT], "c": [HOT]}, planned), HOT) == {"b": 1.0}


def test_who_held_a_slice_serves_it_until_the_new_holder_is_ready() -> None:
    assert shares(table({"a": [HOT], "new": []}, {"new": [Copy(*HOT, 1.0)]}), HOT) == {"a": 1.0}


def test_a_slice_the_plan_gives_to_nobody_runs_inline() -> None:
    assert shares(table({"a": [HOT, COLD]}, {"a": [Copy(*HOT, 1.0)]}), COLD) == {}
