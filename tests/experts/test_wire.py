"""The data plane on real sockets: rows out, results back, and nobody harmed by strangers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.wire import frame, sockets
from experts.wire.arena import Arena
from experts.wire.channel import Call, CallRefusedError, Channel
from experts.wire.frame import Frame, FrameError, Kind, Segment
from experts.wire.handshake import ClientHandshake, HandshakeError, Purpose
from experts.wire.server import ExpertServer, NotServedError

SECRET, MODEL = b"secret", "fingerprint"


def scale(layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
    """An expert whose answer shows which layer and expert it was."""
    if layer == 99:
        raise NotServedError("layer 99 is not served here")
    start = 0
    for expert, count in segments:
        out[start : start + count] = rows[start : start + count] * (expert + 1) + layer
        start += count


@pytest.fixture
def server() -> Iterator[ExpertServer]:
    with ExpertServer(scale, SECRET, MODEL, tcp_host="127.0.0.1") as running:
        yield running


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, server: ExpertServer) -> str:
    return next(a for a in server.addresses if a.startswith(request.param))


@pytest.fixture
def channel(address: str) -> Iterator[Channel]:
    opened = Channel.connect(address, SECRET, MODEL)
    yield opened
    opened.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(1)
    yield made
    made.close()


def call(arena: Arena, seq: int = 1, layer: int = 3, dtype: torch.dtype = torch.float32, offset: int = 0) -> Call:
    request = Call(seq, layer, arena, offset, 8, dtype, ((0, 2), (4, 1)))
    arena.rows(offset, 3, 8, dtype).copy_(torch.arange(24).view(3, 8))
    return request


def answer(request: Call) -> torch.Tensor:
    rows = torch.arange(24, dtype=request.dtype).view(3, 8)
    return rows * torch.tensor([[1], [1], [5]], dtype=request.dtype) + request.layer


@pytest.mark.parametrize("dtype", frame.DTYPES)
def test_rows_go_out_and_results_come_back_in_place(channel: Channel, arena: Arena, dtype: torch.dtype) -> None:
    for seq in (1, 2):
        request = call(arena, seq, dtype=dtype, offset=64 * seq)
        channel.send(request)
        assert channel.receive() > 0
        assert torch.equal(request.results(), answer(request))


def test_a_batch_larger_than_any_socket_buffer_passes(channel: Channel) -> None:
    arena = Arena.create(64 << 20)
    rows = arena.rows(0, 4096, 1024, torch.float32).normal_()
    request = Call(1, 0, arena, 0, 1024, torch.float32, ((1, 4096),))
    channel.send(request)
    channel.receive()
    assert torch.equal(request.results(), rows * 2)
    arena.close()


def test_a_channel_moves_on_to_a_new_arena(channel: Channel, arena: Arena) -> None:
    channel.send(call(arena))
    channel.receive()
    larger = Arena.create(4 << 20)
    request = call(larger, seq=2)
    channel.send(request)
    channel.receive()
    assert torch.equal(request.results(), answer(request))
    larger.close()


def test_a_replica_says_why_it_does_not_run_a_call_and_serves_on(channel: Channel, arena: Arena) -> None:
    channel.send(call(arena, layer=99))
    with pytest.raises(CallRefusedError, match="layer 99 is not served here"):
        channel.receive()
    request = call(arena, seq=2)
    channel.send(request)
    channel.receive()
    assert torch.equal(request.results(), answer(request))


def test_closing_the_server_is_an_end_of_file_for_its_channels(server: ExpertServer, arena: Arena) -> None:
    channel = Channel.connect(server.addresses[0], SECRET, MODEL)
    channel.send(call(arena))
    channel.receive()
    server.close()
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        _round_trip(channel, call(arena, seq=2))
    channel.close()


def _round_trip(channel: Channel, request: Call) -> None:
    channel.send(request)
    channel.receive()


@pytest.mark.parametrize(("secret", "model"), [(b"wrong", MODEL), (SECRET, "another")])
def test_strangers_are_refused(address: str, secret: bytes, model: str) -> None:
    with pytest.raises(HandshakeError, match="secret" if secret == b"wrong" else "another model"):
        Channel.connect(address, secret, model)


def test_garbage_harms_nobody(address: str, channel: Channel, arena: Arena) -> None:
    """Not before the handshake, not after it: the connection ends, the others go on."""
    for prelude in (b"", None):
        sock = sockets.connect(address, 5.0)
        if prelude is None:
            sockets.greet(sock, ClientHandshake(SECRET, Purpose.EXPERT, MODEL))
        sock.sendall(b"\xff" * 4096)
        with pytest.raises(ConnectionError):
            sockets.read(sock, 1 << 20)
        sock.close()
    request = call(arena)
    channel.send(request)
    channel.receive()
    assert torch.equal(request.results(), answer(request))


@pytest.mark.parametrize(
    "head",
    [
        Frame(Kind.CALL, 1, arena=77, rows=1, width=8, segments=((0, 1),)),  # an arena nobody attached
        Frame(Kind.ATTACH, 1, arena=5, aux=4096),  # without a descriptor
        Frame(Kind.REPLY, 1),
        Frame(Kind.CALL, 1, rows=2, width=8, segments=((0, 1),)),  # segments that do not add up
        Frame(Kind.CALL, 1, rows=1 << 20, width=1 << 16, segments=((0, 1 << 20),)),  # absurdly large
    ],
)
def test_a_frame_that_makes_no_sense_ends_its_connection(server: ExpertServer, head: Frame) -> None:
    with sockets.connect(server.addresses[0], 5.0) as sock:
        sockets.greet(sock, ClientHandshake(SECRET, Purpose.EXPERT, MODEL))
        sock.sendall(head.pack())
        with pytest.raises(ConnectionError):
            sockets.read(sock, 1)


def test_an_offset_outside_the_arena_is_refused(server: ExpertServer, arena: Arena) -> None:
    with pytest.raises(FrameError, match="do not fit"):
        arena.rows(arena.capacity - 8, 1, 8, torch.float32)
    channel = Channel.connect(server.addresses[0], SECRET, MODEL)
    channel.send(Call(1, 0, arena, 2 * arena.capacity, 8, torch.float32, ((0, 1),)))
    with pytest.raises(OSError, match=r"closed|reset"):
        channel.receive()
    channel.close()


def test_a_silent_client_keeps_nobody_waiting(server: ExpertServer, arena: Arena) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect("\0" + server.addresses[0].removeprefix("unix:@"))
        channel = Channel.connect(server.addresses[0], SECRET, MODEL)
        channel.send(call(arena))
        channel.receive()
        channel.close()


def test_a_closed_server_leaves_no_thread(arena: Arena) -> None:
    before = set(threading.enumerate())
    with ExpertServer(scale, SECRET, MODEL, tcp_host="127.0.0.1") as server:
        channel = Channel.connect(server.addresses[0], SECRET, MODEL)
        channel.send(call(arena))
        channel.receive()
    channel.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)
    assert set(threading.enumerate()) <= before


@given(
    kind=st.sampled_from(Kind),
    dtype=st.sampled_from(frame.DTYPES),
    layer=st.integers(0, 2**16 - 1),
    seq=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    segments=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1000)), max_size=20),
)
def test_a_frame_survives_packing(
    kind: Kind, dtype: torch.dtype, layer: int, seq: int, offset: int, segments: list[Segment]
) -> None:
    rows = sum(count for _, count in segments)
    head = Frame(kind, seq, layer, dtype, 7, offset, rows, 16, 5, tuple(segments))
    data = head.pack()
    assert frame.unpack(data[: frame.HEADER.size], data[frame.HEADER.size :]) == head


@given(st.binary(min_size=frame.HEADER.size, max_size=frame.HEADER.size))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        frame.segment_bytes(data)
