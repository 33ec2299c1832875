"""`gateway.inline: prefer`: a layer's rows stay here whenever the cost model says that is faster."""

from gateway.assignment import Part
from gateway.inline_choice import InlineChoice
from placement.cost import Speed

SPEED = Speed(read_s=1e-3, row_s=1e-5)
PARTS = [Part(expert, expert, 1) for expert in range(8)]
SPREAD = [[part] for part in PARTS]


def test_a_single_expert_is_computed_here() -> None:
    assert InlineChoice(SPEED).here([PARTS[:1]], [])


def test_many_experts_on_many_replicas_are_sent_there() -> None:
    assert not InlineChoice(SPEED).here(SPREAD, [])


def test_many_experts_on_one_replica_are_computed_here() -> None:
    assert InlineChoice(SPEED).here([PARTS], [])


def test_replicas_that_turn_out_slow_lose_their_rows_and_are_tried_again_much_later() -> None:
    choice = InlineChoice(SPEED)
    for _ in range(50):
        choice.was_there(SPREAD, 0.1)  # they share the cores, say
    assert choice.here(SPREAD, [])
    tries = 0
    while choice.here(SPREAD, []):
        tries += 1
        assert tries < 100_000
    assert tries > 100


def test_a_slow_gateway_sends_what_it_would_otherwise_keep() -> None:
    choice = InlineChoice(SPEED)
    for _ in range(50):
        choice.was_here(PARTS, 0.1)
    assert not choice.here([PARTS[:1]], [])
