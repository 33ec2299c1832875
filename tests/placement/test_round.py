"""A planning round: counts that follow the load with patience, copies and shares that follow it at once."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from placement.arrays import Floats
from placement.plan import Plan, decode, encode
from placement.problem import ProblemError
from placement.settings import GIB, Override, PlacementSettings, RoundSettings
from placement.views import LoadView, ReplicaView
from tests.placement.fleets import (
    EXPERTS,
    INLINE,
    LAYERS,
    SLICE,
    Fleet,
    load,
    rounds,
    settings,
    shares,
    units,
    whole,
)

EVEN = [10.0, 10.0, 10.0, 10.0]
HOT = [60.0, 10.0, 10.0, 10.0]
"""Expert 0 gets most rows."""


def one_each(**given: object) -> list[ReplicaView]:
    return [whole(unit.name, 0, **given) for unit in units()]


@st.composite
def fleets(draw: st.DrawFn, grain: int) -> list[ReplicaView]:
    """Up to 3 replicas of each unit, unlike, some draining, some too small, holding anything."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for unit in units(grain):
        for number in range(random.integers(0, 4)):
            slices = [(layer, expert) for layer in LAYERS for expert in unit.experts if random.random() < 0.4]
            measured = random.random() < 0.5
            view = ReplicaView(
                id=f"{unit.name}#{number}",
                unit=unit.name,
                node=str(random.integers(2)),
                slices=frozenset(slices),
                memory_bytes=int(random.choice([0, 0, len(slices) + 1])) * SLICE,
                read_s=1e-3 if measured else None,
                row_s=float(random.choice([0.5e-3, 1e-3, 4e-3])) if measured else None,
                near=bool(random.random() < 0.7),
                draining=bool(random.random() < 0.2),
                started_at=float(random.integers(10)),
            )
            found.append(view)
    return found


@st.composite
def loads(draw: st.DrawFn, now_s: float) -> LoadView:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = random.choice([0.0, 0.1, 3.0, 40.0], (len(LAYERS), EXPERTS)) * draw(st.sampled_from([0.0, 1.0, 1.0]))
    view = load(now_s, rows, random.choice([0.0, 1e4], rows.shape))
    return dataclasses.replace(view, p90=view.rows * 1.5)


@st.composite
def anything(draw: st.DrawFn) -> RoundSettings:
    least = draw(st.integers(0, 2))
    bounded = Override(
        experts=[0], layers=draw(st.sampled_from([None, [3]])), min_replicas=1, max_replicas=1, pin=draw(st.booleans())
    )
    placement = PlacementSettings(
        max_bytes=draw(st.sampled_from([None, 5 * SLICE, 20 * SLICE])),
        gib_worth=draw(st.sampled_from([0.0, 1e3, 1e5])),
        spread_above=draw(st.sampled_from([None, 1.0])),
        max_moved_bytes=draw(st.sampled_from([None, 0, 3 * SLICE])),
    )
    return RoundSettings(
        method=draw(st.sampled_from(["evermoe", "evermoe", "evermoe", "oracle"])),
        placement=placement,
        replicas=draw(st.integers(0, 2)),
        min_replicas=least,
        max_replicas=least + draw(st.integers(0, 4)),
        overrides=(bounded,) if draw(st.booleans()) else (),
        replica_bytes=draw(st.sampled_from([None, SLICE, 2 * SLICE])),
        headroom=draw(st.booleans()),
        cool_down_s=draw(st.sampled_from([0.0, 3.0])),
    )


@given(st.data(), st.sampled_from([1, 2]))
@hypothesis(max_examples=200, deadline=None)
def test_any_round_keeps_every_promise(data: st.DataObject, grain: int) -> None:
    wanted = data.draw(anything())
    subject, twin = rounds(wanted, grain), rounds(wanted, grain)
    epoch, asked = 0, dict[tuple[int, int], dict[str, float]]()
    for turn in range(3):
        replicas, view = data.draw(fleets(grain)), data.draw(loads(float(turn)))
        before = {each.id: each.slices for each in replicas}
        plan = subject.decide(view, replicas, INLINE)
        assert plan == twin.decide(view, replicas[::-1], INLINE), "deterministic, whatever the order of replicas"
        assert decode(encode(plan)) == plan
        check(plan, replicas, wanted, grain)
        if wanted.placement.max_moved_bytes is not None and plan.epoch > epoch:
            loaded = [
                (each, replica)
                for each, found in shares(plan).items()
                for replica in found
                if each not in before[replica] and replica not in asked.get(each, {})
            ]
            assert len(loaded) * SLICE <= wanted.placement.max_moved_bytes, "moves are bounded"
        assert plan.epoch >= epoch
        epoch, asked = plan.epoch, shares(plan)


def check(plan: Plan, replicas: list[ReplicaView], wanted: RoundSettings, grain: int) -> None:
    """What holds for every plan."""
    live = {each.id: each for each in replicas if not each.draining}
    names = {unit.name: unit for unit in units(grain)}
    assert plan.copies is not None
    assert plan.replicas.keys() == plan.reasons.keys() == names.keys()
    assert plan.copies.keys() == live.keys(), "who is told to go is not named; all others are"
    least, most = wanted.min_replicas, max(wanted.max_replicas, 1)
    assert all(
        least <= count <= most for unit, count in plan.replicas.items() if not wanted.overrides or "-0" not in unit
    )
    for each, copies in plan.copies.items():
        memory = live[each].memory_bytes or wanted.replica_bytes
        assert memory is None or len(copies) * SLICE <= memory, "within a replica's memory"
        assert all(copy.expert in names[live[each].unit].experts for copy in copies), "its own unit"
        assert len({(copy.layer, copy.expert) for copy in copies}) == len(copies)
    total = sum(len(copies) for copies in plan.copies.values())
    assert wanted.placement.max_bytes is None or total * SLICE <= wanted.placement.max_bytes, "within the budget"
    for found in shares(plan).values():
        assert sum(found.values()) == pytest.approx(1)
        assert min(found.values()) >= 0
    holding = Counter(live[each].unit for each, copies in plan.copies.items() if copies)
    assert all(count <= plan.replicas[unit] for unit, count in holding.items()), "those that will go hold nothing"


def test_every_slice_is_held_where_memory_allows() -> None:
    plan = rounds(settings()).decide(load(0, HOT), one_each(), INLINE)
    assert shares(plan) == {
        (layer, expert): {f"expert-{expert}#0": 1.0} for layer in LAYERS for expert in range(EXPERTS)
    }


def test_load_moves_from_one_expert_to_another_and_back_and_replicas_follow() -> None:
    wanted = settings(budget=18, max_replicas=6, cool_down_s=5)
    subject, fleet = rounds(wanted), Fleet(delay=2)
    plans = []
    for now in range(90):
        rows = np.roll(HOT, 2 if 30 <= now < 60 else 0)
        plan = subject.decide(load(now, rows), fleet.replicas, INLINE)
        check(plan, fleet.replicas, wanted, 1)
        fleet.obey(plan)
        plans.append(plan)
    assert [plan.epoch for plan in plans] == sorted(plan.epoch for plan in plans)
    assert plans[29].replicas == plans[89].replicas == {"expert-0": 3, "expert-1": 1, "expert-2": 1, "expert-3": 1}
    assert plans[59].replicas == {"expert-0": 1, "expert-1": 1, "expert-2": 3, "expert-3": 1}
    assert plans[30].replicas["expert-2"] == 3, "up at once"
    assert [plan.replicas["expert-0"] for plan in plans[30:36]] == [3, 3, 3, 3, 3, 1], "down after the cool-down"
    assert list(shares(plans[33])[1, 2].values()) == pytest.approx([1 / 3] * 3, abs=0.03), "rows follow as they come"
    assert len({plan.epoch for plan in plans}) < 20, "where nothing changes there is no new plan"


def test_load_that_comes_back_within_the_cool_down_finds_its_replicas_warm() -> None:
    subject, fleet = rounds(settings(budget=18, cool_down_s=10)), Fleet(delay=1)
    for now in range(20):
        fleet.obey(subject.decide(load(now, HOT), fleet.replicas, INLINE))
    for now in range(20, 25):
        plan = subject.decide(load(now, EVEN), fleet.replicas, INLINE)
        assert plan.replicas["expert-0"] == 3
        fleet.obey(plan)
    plan = subject.decide(load(25, HOT), fleet.replicas, INLINE)
    assert len(shares(plan)[LAYERS[0], 0]) == 3


def test_a_new_replica_takes_rows_in_the_round_after_it_is_there() -> None:
    subject = rounds(settings(budget=18))
    plan = subject.decide(load(0, HOT), one_each(), INLINE)
    assert plan.replicas["expert-0"] == 3
    assert set(shares(plan)[LAYERS[0], 0]) == {"expert-0#0"}
    plan = subject.decide(load(1, HOT), [*one_each(), whole("expert-0", 1)], INLINE)
    assert shares(plan)[LAYERS[0], 0] == {"expert-0#0": pytest.approx(0.5), "expert-0#1": pytest.approx(0.5)}


def test_to_zero_when_idle_and_up_again_with_the_first_rows() -> None:
    subject, fleet = rounds(settings(idle_to_zero_s=60)), Fleet()
    for now in range(5):
        fleet.obey(subject.decide(load(now, EVEN), fleet.replicas, INLINE))
    idle = [subject.decide(load(now, np.zeros(4), now - 5.0), fleet.replicas, INLINE) for now in range(5, 70)]
    assert all(set(plan.replicas.values()) == {1} for plan in idle[:60]), "nothing runs, all stays as it was"
    assert set(idle[60].replicas.values()) == {0}
    assert not shares(idle[60])
    assert idle[60].reasons["expert-1"] == "no row for 60 s"
    back = subject.decide(load(71, [5.0, 0.0, 0.0, 0.0], np.tile([0.0, 65.0, 65.0, 65.0], (3, 1))), [], INLINE)
    assert list(back.replicas.values()) == [4, 0, 0, 0], "with the memory that the others left"


def test_a_unit_that_gets_no_rows_goes_to_zero_alone() -> None:
    subject = rounds(settings(idle_to_zero_s=60, min_replicas=0))
    idle = np.tile([0.0, 0.0, 0.0, 100.0], (3, 1))
    plan = subject.decide(load(0, [5.0, 4.0, 3.0, 0.0], idle), one_each(), INLINE)
    assert list(plan.replicas.values())[3] == 0
    assert plan.replicas["expert-0"] == 2, "with the memory that is left"
    kept = rounds(settings(idle_to_zero_s=60, min_replicas=1)).decide(
        load(0, [5.0, 5.0, 5.0, 0.0], idle), one_each(), INLINE
    )
    assert list(kept.replicas.values()) == [1, 1, 1, 1]
    assert kept.reasons["expert-3"] == "no row for 100 s; min_replicas keeps 1"


def test_a_slice_that_is_not_worth_its_memory_is_left_to_the_gateway() -> None:
    # 10 steps a second, a row of 1 ms in each
    worth = 0.05 * GIB / SLICE
    subject = rounds(settings(gib_worth=worth, cool_down_s=0))
    plan = subject.decide(load(0, [60.0, 60.0, 60.0, 1.0]), one_each(), INLINE)
    assert plan.replicas["expert-3"] == 0
    assert plan.replicas["expert-0"] == 2
    assert "the gateway computes" in plan.reasons["expert-3"]


def test_never_more_copies_than_help() -> None:
    slow_read = dataclasses.replace(INLINE, read_s=100e-3)
    plan = rounds(settings(budget=1000)).decide(load(0, HOT), one_each(), slow_read)
    assert set(plan.replicas.values()) == {1}
    assert max(rounds(settings(budget=1000)).decide(load(0, HOT), one_each(), INLINE).replicas.values()) > 4


def test_without_a_budget_there_is_the_memory_of_the_replicas_to_start_with() -> None:
    assert set(rounds(settings()).decide(load(0, HOT), one_each(), INLINE).replicas.values()) == {1}
    plan = rounds(settings(replicas=2, cool_down_s=0)).decide(load(0, HOT), one_each(), INLINE)
    assert list(plan.replicas.values()) == [5, 1, 1, 1]


def test_a_unit_is_scaled_up_only_for_a_gain_beyond_the_hysteresis() -> None:
    subject = rounds(settings(budget=15))
    assert subject.decide(load(0, [11.0, 10.0, 10.0, 10.0]), one_each(), INLINE).replicas["expert-0"] == 1
    assert subject.decide(load(1, [13.0, 10.0, 10.0, 10.0]), one_each(), INLINE).replicas["expert-0"] == 2


@given(st.integers(0, 2**32 - 1))
@hypothesis(max_examples=12, deadline=None)
def test_a_small_change_of_load_is_a_small_change_of_the_plan(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = 20 * np.exp(random.normal(0, 1, (len(LAYERS), EXPERTS)))
    subject, fleet = rounds(settings(budget=20)), Fleet(delay=1)
    for now in range(30):
        settled = subject.decide(load(now, rows), fleet.replicas, INLINE)
        fleet.obey(settled)
    before, moved = where(settled), 0
    for now in range(30, 40):
        nudged = rows * np.exp(random.normal(0, 0.005, rows.shape))
        plan = subject.decide(load(now, nudged), fleet.replicas, INLINE)
        assert sum(abs(plan.replicas[unit] - count) for unit, count in settled.replicas.items()) <= 2
        moved += len(where(plan) - before)
        before = where(plan)
        fleet.obey(plan)
    assert moved <= 4, "in ten rounds"


def where(plan: Plan) -> set[tuple[int, int, str]]:
    """Layer, expert and replica of each copy."""
    return {(*each, replica) for each, found in shares(plan).items() for replica in found}


@given(st.integers(0, 2**32 - 1))
@hypothesis(max_examples=12, deadline=None)
def test_more_memory_is_never_worse(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = 20 * np.exp(random.normal(0, 1, (len(LAYERS), EXPERTS)))
    seconds = []
    for budget in (12, 16, 24, 36, 60):
        subject, fleet = rounds(settings(budget=budget, max_replicas=10)), Fleet(delay=1)
        for now in range(15):
            plan = subject.decide(load(now, rows), fleet.replicas, INLINE)
            fleet.obey(plan)
        seconds.append(layer_seconds(plan, rows))
    assert all(after <= before * 1.02 for before, after in itertools.pairwise(seconds)), seconds


def layer_seconds(plan: Plan, rows: Floats) -> float:
    """Of all layers, the slowest replica of each: units of one expert."""
    return sum(
        max(float(rows[place, expert]) * max(shares(plan)[layer, expert].values()) for expert in range(EXPERTS))
        for place, layer in enumerate(LAYERS)
    )


def test_replicas_get_rows_as_they_are_fast() -> None:
    replicas = [
        *one_each(),
        whole("expert-0", 1, read_s=1e-3, row_s=1e-3),
        whole("expert-0", 2, read_s=0.5e-3, row_s=0.5e-3),
    ]
    found = shares(rounds(settings(budget=18)).decide(load(0, HOT), replicas, INLINE))[LAYERS[0], 0]
    assert found["expert-0#2"] == pytest.approx(2 * found["expert-0#1"], rel=0.05)


def test_what_was_not_measured_counts_like_the_others_or_as_declared() -> None:
    fast = {"read_s": 0.1e-3, "row_s": 0.1e-3}
    replicas = [whole("expert-0", number, **fast) for number in (1, 2)] + one_each()
    wanted = settings(budget=18, device=INLINE)
    found = shares(rounds(wanted).decide(load(0, HOT), replicas, INLINE))[LAYERS[0], 0]
    assert found == {f"expert-0#{number}": pytest.approx(1 / 3, rel=0.05) for number in range(3)}


def test_the_gateways_own_host_comes_first() -> None:
    replicas = [*one_each(near=False), whole("expert-0", 1)]
    wanted = settings(budget=15, far_s=10e-3)
    found = shares(rounds(wanted).decide(load(0, [20.0, 1, 1, 1]), replicas, INLINE))[LAYERS[0], 0]
    assert found["expert-0#1"] > 0.7


def test_who_is_told_to_go_gets_nothing_and_the_others_its_rows() -> None:
    subject = rounds(settings(budget=18))
    pair = [whole("expert-0", 1), *one_each()]
    assert len(shares(subject.decide(load(0, HOT), pair, INLINE))[LAYERS[0], 0]) == 2
    pair[0] = dataclasses.replace(pair[0], draining=True)
    plan = subject.decide(load(1, HOT), pair, INLINE)
    assert shares(plan)[LAYERS[0], 0] == {"expert-0#0": 1.0}
    assert "expert-0#1" not in (plan.copies or {})


def test_more_replicas_than_wanted_the_newest_hold_nothing() -> None:
    replicas = [*one_each(), whole("expert-1", 1)]
    plan = rounds(settings(cool_down_s=0)).decide(load(0, EVEN), replicas, INLINE)
    assert plan.replicas["expert-1"] == 1
    assert plan.copies is not None
    assert plan.copies["expert-1#1"] == []
    assert len(plan.copies["expert-1#0"]) == len(LAYERS)


def test_a_lost_replica_is_replaced_by_those_that_live() -> None:
    subject = rounds(settings(budget=18))
    three = [*one_each(), whole("expert-0", 1), whole("expert-0", 2)]
    subject.decide(load(0, HOT), three, INLINE)
    plan = subject.decide(load(1, HOT), three[1:], INLINE)
    assert plan.replicas["expert-0"] == 3
    assert set(shares(plan)[LAYERS[0], 0]) == {"expert-0#1", "expert-0#2"}


def test_hot_slices_are_on_two_nodes_where_there_are_two() -> None:
    wanted = RoundSettings(placement=PlacementSettings(max_bytes=24 * SLICE, spread_above=1.0))
    replicas = [*one_each(), whole("expert-0", 1), whole("expert-0", 2, node="b")]
    found = shares(rounds(wanted).decide(load(0, HOT), replicas, INLINE))
    assert all("expert-0#2" in found[layer, 0] for layer in LAYERS)


def test_overrides_bound_slices_and_units_and_later_ones_win() -> None:
    wanted = settings(
        budget=40,
        cool_down_s=0,
        idle_to_zero_s=60,
        overrides=(
            Override(experts=[0], max_replicas=2),
            Override(experts=[2, 3], min_replicas=2),
            Override(experts=[3], min_replicas=0),
            Override(experts=[1], layers=[3], pin=True),
        ),
    )
    plan = rounds(wanted).decide(load(0, HOT, 100.0), one_each(), INLINE)
    assert list(plan.replicas.values()) == [0, 1, 2, 0]
    assert list(shares(plan)) == [(3, 1), *((layer, 2) for layer in LAYERS)]
    assert rounds(wanted).decide(load(0, HOT), one_each(), INLINE).replicas["expert-0"] == 2


def test_replicas_that_hold_only_some_slices_are_as_many_as_it_takes() -> None:
    plan = rounds(settings(replica_bytes=SLICE)).decide(load(0, EVEN), one_each(), INLINE)
    assert set(plan.replicas.values()) == {len(LAYERS)}


def test_a_unit_of_several_experts_gets_replicas_for_their_work_together() -> None:
    plan = rounds(settings(budget=12), experts=2).decide(load(0, [20.0, 20, 10, 10]), [], INLINE)
    assert plan.replicas == {"expert-0-1": 2, "expert-2-3": 1}


def test_before_the_first_row_all_slices_are_held_if_memory_allows() -> None:
    nothing = load(0, np.zeros(4))
    assert len(shares(rounds(settings(gib_worth=1e9)).decide(nothing, one_each(), INLINE))) == 12
    assert len(shares(rounds(settings(budget=5)).decide(nothing, one_each(), INLINE))) == 5


def test_another_policy_counts_from_the_next_round_on() -> None:
    subject = rounds(settings(budget=18))
    assert subject.decide(load(0, HOT), one_each(), INLINE).replicas["expert-0"] == 3
    subject.use(settings(budget=18, max_replicas=2))
    assert subject.decide(load(1, HOT), one_each(), INLINE).replicas["expert-0"] == 2


def test_a_planner_that_starts_again_goes_on_where_the_last_plan_was() -> None:
    before = rounds(settings(budget=18)).decide(load(0, HOT), one_each(), INLINE)
    again = rounds(settings(budget=18), last=before)
    assert again.decide(load(100, HOT), one_each(), INLINE) is before
    after = again.decide(load(101, [0.5, 10, 10, 10]), one_each(), INLINE)
    assert after.replicas["expert-0"] == 3, "the cool-down begins anew"
    assert after.epoch == before.epoch + 1


@pytest.mark.parametrize("method", ["eplb", "eplb-hierarchical", "moeless"])
def test_other_methods_count_with_the_same_memory(method: str) -> None:
    subject, fleet = rounds(settings(budget=18, method=method, cool_down_s=2)), Fleet(delay=1)
    for now in range(10):
        plan = subject.decide(load(now, HOT), fleet.replicas, INLINE)
        check(plan, fleet.replicas, settings(budget=18), 1)
        fleet.obey(plan)
    assert list(plan.replicas.values()) == [3, 1, 1, 1]
    assert shares(plan)[LAYERS[0], 0].values() == pytest.approx([1 / 3] * 3)
    quiet = subject.decide(load(1e6, np.zeros(4), 1e6), fleet.replicas, INLINE)
    assert quiet.replicas == plan.replicas, "they know no idleness"


def test_static_means_static() -> None:
    subject = rounds(settings(method="static", replicas=2))
    plan = subject.decide(load(0, HOT), one_each(), INLINE)
    assert set(plan.replicas.values()) == {2}
    assert plan.copies is not None
    assert all(copy.share == 1 for held in plan.copies.values() for copy in held)
    assert subject.decide(load(1, np.zeros(4), 1e6), one_each(), INLINE) is plan


def test_a_method_that_lacks_the_memory_says_so() -> None:
    with pytest.raises(
        ProblemError, match=r"eplb needs a copy of each of 4 experts in every layer: the memory is for 3"
    ):
        rounds(settings(budget=9, method="eplb")).decide(load(0, HOT), one_each(), INLINE)


def test_reasons_are_words() -> None:
    subject = rounds(settings(budget=18, max_replicas=3))
    plan = subject.decide(load(0, HOT), one_each(), INLINE)
    assert plan.reason.startswith("evermoe: 6 replicas of 4 units, 12 copies of slices in")
    assert "layer 1 takes longest, 60.3 ms a step" in plan.reason
    assert plan.reasons["expert-0"] == (
        "expert 0 gets 60 rows a step in layer 5, 60 ms of work; no more than 3 by max_replicas or the cores there are"
    )
    calm = subject.decide(load(1, [1.0, 1.0, 1.0, 60.0]), one_each(), INLINE)
    assert calm.reasons["expert-0"].endswith("1 would do, if that holds for 10 s")
