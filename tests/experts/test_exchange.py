"""A layer's calls to all its replicas at once: the compiled way and the other do the same, whatever comes back."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.tally import Tally
from experts.wire import exchange
from experts.wire.arena import Arena
from experts.wire.channel import Call, CallRefusedError, Channel
from experts.wire.frame import Frame, Kind, Segment
from experts.wire.server import ExpertServer, NotServedError
from tests.waiting import eventually

SECRET, MODEL, WIDTH, INNER = b"secret", "fingerprint", 32, 64
REPLY = Frame(Kind.REPLY, 7, rows=3, aux=5)


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request: pytest.FixtureRequest, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "_loaded", False)
    if request.param == "compiled":
        assert kernels.load(compiled_folder)
    return str(request.param)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(1)
    yield made
    made.close()


class Pair:
    """A channel that knows an arena, and the replica's end of its connection."""

    def __init__(self, arena: Arena) -> None:
        ours, self.replica = socket.socketpair()
        self.replica.settimeout(5.0)
        self.channel = Channel(ours, "pair")
        self.channel._attached = arena.id
        self.call = Call(7, 3, arena, 64, WIDTH, torch.bfloat16, ((0, 2), (4, 1)))

    def close(self) -> None:
        self.channel.close()
        self.replica.close()


@pytest.fixture
def pairs(arena: Arena) -> Iterator[list[Pair]]:
    made = [Pair(arena) for _ in range(3)]
    yield made
    for pair in made:
        pair.close()


def start(pairs: Sequence[Pair]) -> list[str | None]:
    return exchange.send([(pair.channel, pair.call) for pair in pairs])


def wait(pairs: Sequence[Pair], seconds: float = 5.0) -> list[exchange.Outcome]:
    return exchange.receive([pair.channel for pair in pairs], [seconds] * len(pairs))


def test_every_replica_gets_its_frame(pairs: list[Pair]) -> None:
    assert start(pairs) == [None] * 3
    for pair in pairs:
        expected = pair.channel.pack(pair.call)
        assert pair.replica.recv(4096) == expected
        assert pair.channel.outstanding is pair.call


def test_replies_are_taken_in_any_order(pairs: list[Pair]) -> None:
    start(pairs)
    for pair in pairs[::-1]:
        pair.replica.sendall(REPLY.pack())
    assert all(isinstance(outcome, float) and 0 < outcome < 5 for outcome in wait(pairs))
    assert all(pair.channel.outstanding is None for pair in pairs)


def test_a_reply_may_come_in_pieces(pairs: list[Pair]) -> None:
    start(pairs[:1])
    packed = REPLY.pack()
    pairs[0].replica.sendall(packed[:20])
    rest = threading.Timer(0.05, lambda: pairs[0].replica.sendall(packed[20:]))
    rest.start()
    assert isinstance(wait(pairs[:1])[0], float)
    rest.join()


def test_a_replica_that_is_gone_is_told_when_sending_or_waiting(pairs: list[Pair]) -> None:
    pairs[0].replica.close()
    failures = start(pairs)
    assert failures[0] is not None
    assert "Broken pipe" in failures[0]
    assert failures[1:] == [None, None]
    pairs[2].replica.close()
    pairs[1].replica.sendall(REPLY.pack())
    fine, gone = wait(pairs[1:])
    assert isinstance(fine, float)
    assert isinstance(gone, str)
    assert "closed" in gone or "reset" in gone


def test_a_silent_replica_costs_the_others_nothing(pairs: list[Pair]) -> None:
    start(pairs)
    for pair in pairs[:2]:
        pair.replica.sendall(REPLY.pack())
    first, second, silent = wait(pairs, 0.1)
    assert isinstance(first, float)
    assert isinstance(second, float)
    assert isinstance(silent, str)
    assert "timed out" in silent


def test_a_refusal_tells_its_reason_and_the_channel_goes_on(pairs: list[Pair]) -> None:
    start(pairs[:1])
    pairs[0].replica.sendall(Frame(Kind.ERROR, 7, aux=9).pack() + b"no expert")
    assert wait(pairs[:1]) == ["no expert"]
    start(pairs[:1])
    pairs[0].replica.sendall(REPLY.pack())
    assert isinstance(wait(pairs[:1])[0], float)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Frame(Kind.REPLY, 6, rows=3).pack(), "a reply to call 6, expected 7"),
        (Frame(Kind.REPLY, 7, rows=2).pack(), "a reply that does not fit its call"),
        (Frame(Kind.CALL, 7, rows=3, segments=((0, 3),)).pack(), "a frame with missing segments"),
        (Frame(Kind.ATTACH, 7, rows=3).pack(), "a reply that does not fit its call"),
        (Frame(Kind.ERROR, 7, aux=1 << 20).pack(), "a frame with an oversized error text"),
        (b"\xff" * 4096, "garbage instead of a frame"),
    ],
)
def test_what_is_no_reply_is_refused_in_the_same_words(pairs: list[Pair], answer: bytes, reason: str) -> None:
    start(pairs[:1])
    pairs[0].replica.sendall(answer)
    assert wait(pairs[:1]) == [reason]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(answer=st.binary(max_size=100))
def test_random_bytes_are_no_reply(arena: Arena, answer: bytes) -> None:
    pair = Pair(arena)
    start([pair])
    pair.replica.sendall(answer)
    pair.replica.close()
    assert isinstance(wait([pair])[0], str)
    pair.close()


class Experts:
    """Slices of one layer by the compiled kernel, answered in Python and by the shortcut; counts the former."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.up = [torch.randn(2 * INNER, WIDTH).to(dtype) for _ in range(3)]
        self.down = [torch.randn(WIDTH, INNER).to(dtype) for _ in range(3)]
        self.in_python = 0
        self.tally = Tally()

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        self.in_python += 1
        if layer != 1 or any(expert > 2 for expert, _ in segments):
            raise NotServedError("only experts 0 to 2 of layer 1")
        counts = [count for _, count in segments]
        chosen = [expert for expert, _ in segments]
        kernels.expert_ffn(rows, counts, [self.up[e] for e in chosen], [self.down[e] for e in chosen], out)

    def shortcut(self, descriptor: int, arena: int, memory: torch.Tensor) -> None:
        slices = [(1, 0), (1, 1), (1, 2)]
        kernels.serve(descriptor, arena, memory, slices, self.up, self.down, self.tally.numbers, self.tally.stamp)


@pytest.fixture
def experts(way: str) -> Experts:
    if way != "compiled":
        pytest.skip("the shortcut is compiled code")
    return Experts()


@pytest.fixture
def channel(experts: Experts) -> Iterator[Channel]:
    with ExpertServer(experts.compute, SECRET, MODEL, shortcut=experts.shortcut) as server:
        opened = Channel.connect(server.addresses[0], SECRET, MODEL)
        yield opened
        opened.close()


def ask(channel: Channel, experts: Experts, arena: Arena, segments: Sequence[Segment], **other: int) -> None:
    """One call, its answer compared."""
    call = Call(other.get("seq", 1), 1, arena, other.get("offset", 0), WIDTH, torch.float32, tuple(segments))
    rows = arena.rows(call.offset, call.rows, WIDTH, torch.float32).normal_()
    channel.send(call)
    channel.receive()
    expected = torch.empty_like(rows)
    Experts.compute(experts, 1, segments, rows, expected)
    experts.in_python -= 1
    assert torch.equal(call.results(), expected)


def test_calls_are_answered_without_python(channel: Channel, experts: Experts, arena: Arena) -> None:
    for seq in range(1, 5):
        ask(channel, experts, arena, [(0, 2), (2, seq)], seq=seq, offset=128 * seq)
    assert experts.in_python == 0


def test_calls_without_python_are_counted_and_timed(channel: Channel, experts: Experts, arena: Arena) -> None:
    for seq in range(1, 101):
        ask(channel, experts, arena, [(0, 2), (2, 1)], seq=seq)
    seconds, calls, rows = experts.tally.totals()
    assert (calls, rows) == (100, 300)
    latest = experts.tally.latest()
    assert 0 < sum(call.seconds for call in latest) < seconds
    assert {(call.segments, call.rows) for call in latest} == {(2, 3)}
    ask(channel, experts, arena, [(1, 5)], seq=101)
    assert [(call.segments, call.rows) for call in experts.tally.latest()] == [(1, 5)]


def test_when_other_slices_are_loaded_python_has_a_look(channel: Channel, experts: Experts, arena: Arena) -> None:
    ask(channel, experts, arena, [(0, 1)])
    held = sys.getrefcount(experts.up)
    experts.tally.change()
    eventually(lambda: sys.getrefcount(experts.up) < held)  # although no frame came
    ask(channel, experts, arena, [(0, 1)], seq=2)
    assert experts.in_python == 1
    ask(channel, experts, arena, [(0, 1)], seq=3)
    assert experts.in_python == 1


def test_in_a_new_arena_too(channel: Channel, experts: Experts, arena: Arena) -> None:
    ask(channel, experts, arena, [(1, 1)])
    larger = Arena.create(4 << 20)
    ask(channel, experts, larger, [(1, 3)], seq=2, offset=3 << 20)
    larger.close()
    assert experts.in_python == 0


@pytest.mark.parametrize(
    ("layer", "segments", "dtype"),
    [(1, ((3, 1),), torch.float32), (0, ((0, 1),), torch.float32), (1, ((0, 1),), torch.bfloat16)],
    ids=["expert", "layer", "dtype"],
)
def test_what_is_not_served_is_refused_by_python_and_the_next_call_answered(
    channel: Channel, experts: Experts, arena: Arena, layer: int, segments: tuple[Segment, ...], dtype: torch.dtype
) -> None:
    channel.send(Call(1, layer, arena, 0, WIDTH, dtype, segments))
    with pytest.raises(CallRefusedError):
        channel.receive()
    assert experts.in_python == 1
    ask(channel, experts, arena, [(0, 1)], seq=2)
    assert experts.in_python == 1


def test_a_call_of_many_segments_or_none_is_left_to_python(channel: Channel, experts: Experts, arena: Arena) -> None:
    ask(channel, experts, arena, [(0, 1)] * 300)
    assert experts.in_python == 1


@pytest.mark.parametrize(
    ("offset", "width", "rows"),
    [(2**63, WIDTH, 1), (2, WIDTH, 1), (1 << 20, WIDTH, 1), (0, WIDTH, 2**25), (0, WIDTH, 2), (0, 2 * WIDTH, 1)],
)
def test_a_call_outside_of_its_memory_touches_nothing(
    channel: Channel, experts: Experts, arena: Arena, offset: int, width: int, rows: int
) -> None:
    ask(channel, experts, arena, [(0, 1)])
    head = Frame(Kind.CALL, 2, 1, torch.float32, arena.id, offset, rows, width, 0, ((0, 1),))
    channel._sock.sendall(head.pack())
    channel.outstanding = Call(2, 1, arena, 0, WIDTH, torch.float32, ((0, 1),))
    with pytest.raises((OSError, CallRefusedError)):
        channel.receive()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(garbage=st.binary(min_size=1, max_size=200))
def test_garbage_ends_the_connection(experts: Experts, arena: Arena, garbage: bytes) -> None:
    with ExpertServer(experts.compute, SECRET, MODEL, shortcut=experts.shortcut) as server:
        channel = Channel.connect(server.addresses[0], SECRET, MODEL)
        ask(channel, experts, arena, [(0, 1)])
        channel._sock.sendall(garbage)
        channel._sock.shutdown(socket.SHUT_WR)
        channel.outstanding = Call(2, 1, arena, 0, WIDTH, torch.float32, ((0, 1),))
        with pytest.raises(ConnectionError):
            channel.receive()
        channel.close()


def test_closing_the_server_wakes_who_waits_without_python(experts: Experts, arena: Arena) -> None:
    before = set(threading.enumerate())
    with ExpertServer(experts.compute, SECRET, MODEL, shortcut=experts.shortcut) as server:
        channel = Channel.connect(server.addresses[0], SECRET, MODEL)
        ask(channel, experts, arena, [(0, 1)])
    assert set(threading.enumerate()) == before
    channel.outstanding = Call(2, 1, arena, 0, WIDTH, torch.float32, ((0, 1),))
    with pytest.raises(ConnectionError):
        channel.receive()
    channel.close()
