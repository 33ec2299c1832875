"""The api <-> gateway connection, over real sockets."""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from experts.wire import sockets
from experts.wire.handshake import HandshakeError
from gateway.link import GatewayClient, GatewayLostError, GatewayServer, framing
from gateway.messages import Delta, StepOutput, Submit
from tests.gateway.fake_engine import MODEL, SECRET, FakeEngine, expected, serve, submit, tokens_of

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Ray Serve runs uvloop, which differs in sockets."""
    return "asyncio", {"use_uvloop": request.param}


@asynccontextmanager
async def connected(server: GatewayServer) -> AsyncIterator[GatewayClient]:
    client = await GatewayClient.connect(server.addresses[-1], SECRET, MODEL)
    try:
        yield client
    finally:
        await client.aclose()


async def in_engine(engine: FakeEngine, condition: str) -> None:
    """Wait until e.g. "cancelled == 1" holds for the engine."""
    name, value = condition.split(" == ")
    await asyncio.to_thread(engine.wait_until, lambda: getattr(engine, name) == int(value))


class TestSequences:
    async def test_a_sequence_arrives_whole_and_in_order(self) -> None:
        async with serve(FakeEngine()) as server, connected(server) as client:
            assert await tokens_of(client, submit(max_tokens=50)) == expected((1, 2, 3), 50)

    async def test_tcp_carries_the_same(self) -> None:
        async with serve(FakeEngine(), tcp_host="127.0.0.1") as server, connected(server) as client:
            assert client.address.startswith("tcp:127.0.0.1:")
            assert client._link._writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert await tokens_of(client, submit()) == expected((1, 2, 3), 5)

    async def test_many_sequences_of_two_api_processes_do_not_mix(self) -> None:
        prompts = [(n, n + 1) for n in range(20)]
        async with serve(FakeEngine()) as server, connected(server) as one, connected(server) as two:
            requests = [
                tokens_of(client, submit(f"{name}{n}", prompt, 30))
                for name, client in (("a", one), ("b", two))
                for n, prompt in enumerate(prompts)
            ]
            assert await asyncio.gather(*requests) == [expected(prompt, 30) for prompt in prompts * 2]

    async def test_one_message_a_step_holds_all_deltas_of_an_api_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outputs: list[list[str]] = []
        pack = framing.pack

        def spy(message: object) -> bytes:
            if isinstance(message, StepOutput):
                outputs.append([delta.request_id for delta in message.deltas])
            return pack(message)  # type: ignore[arg-type]

        monkeypatch.setattr(framing, "pack", spy)
        engine = FakeEngine(paced=True)
        async with serve(engine) as server, connected(server) as one, connected(server) as two:
            ids = [("a", one), ("b", one), ("c", two)]
            tasks = [asyncio.create_task(tokens_of(client, submit(name, max_tokens=100))) for name, client in ids]
            await asyncio.to_thread(engine.wait_until, lambda: len(engine.submitted) >= 1)
            engine.allow(1)
            await asyncio.to_thread(engine.wait_until, lambda: len(engine.submitted) == 3)
            engine.allow(200)
            await asyncio.gather(*tasks)
        assert outputs.count(["a", "b"]) >= 90
        assert outputs.count(["c"]) >= 90

    async def test_a_refused_request_is_the_clients_error_and_harms_no_other(self) -> None:
        async with serve(FakeEngine()) as server, connected(server) as client:
            [delta] = [delta async for delta in client.generate(submit(prompt=(5000,)))]
            assert (delta.finish_reason, delta.error_status) == ("error", 400)
            assert delta.error == "The prompt has a token that is not in the vocabulary."
            assert await tokens_of(client, submit()) == expected((1, 2, 3), 5)

    async def test_what_a_request_needs_is_prepared_while_others_go_on(self) -> None:
        """In another thread; what is cancelled meanwhile never starts, and a refusal is the client's."""
        preparing, go_on = threading.Event(), threading.Event()

        class Slow(FakeEngine):
            def prepare(self, submit: Submit) -> None:
                preparing.set()
                assert go_on.wait(20)
                if submit.params.grammar == "bad":
                    raise ValueError("No such grammar.")

        engine = Slow()
        async with serve(engine) as server, connected(server) as client:
            leaving = asyncio.create_task(tokens_of(client, submit("leaving", grammar="good")))
            await asyncio.to_thread(preparing.wait, 20)
            assert await tokens_of(client, submit("other")) == expected((1, 2, 3), 5)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            staying = asyncio.create_task(tokens_of(client, submit("staying", grammar="good")))
            go_on.set()
            assert await staying == expected((1, 2, 3), 5)
            [refusal] = [delta async for delta in client.generate(submit("bad", grammar="bad"))]
            assert (refusal.error, refusal.error_status) == ("No such grammar.", 400)
        assert [request.request_id for request in engine.submitted] == ["other", "staying"]

    async def test_a_request_id_in_use_is_refused(self) -> None:
        async with (
            serve(FakeEngine()) as server,
            connected(server) as one,
            connected(server) as two,
            aclosing(one.generate(submit(max_tokens=10**9))) as first,
        ):
            assert (await anext(first)).error is None
            [refusal] = [delta async for delta in two.generate(submit())]
            assert refusal.error == "The request id 'r' is in use."
            assert (await anext(first)).error is None

    async def test_a_failing_step_ends_its_requests_and_the_next_one_is_served(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = FakeEngine(paced=True)
        engine.fails = RuntimeError("out of memory")
        async with serve(engine) as server, connected(server) as client:
            engine.allow(1)
            [delta] = [delta async for delta in client.generate(submit())]
            assert (delta.finish_reason, delta.error_status) == ("error", 500)
            assert "out of memory" not in str(delta.error)
            assert "out of memory" in caplog.text
            engine.fails = None
            engine.allow(5)
            assert await tokens_of(client, submit()) == expected((1, 2, 3), 5)

    async def test_an_engine_beyond_repair_hangs_up(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(FakeEngine):
            def cancel(self, request_id: str) -> None:
                raise RuntimeError("beyond repair")

        engine = Broken(paced=True)
        engine.fails = RuntimeError("first")
        engine.allow(1)
        async with serve(engine) as server, connected(server) as client:
            with pytest.raises(GatewayLostError):
                await tokens_of(client, submit())
            assert not server.healthy
        assert "beyond repair" in caplog.text

    async def test_an_idle_engine_is_left_alone(self) -> None:
        class Counted(FakeEngine):
            asked = 0

            @property
            def has_work(self) -> bool:
                self.asked += 1
                return super().has_work

        engine = Counted()
        async with serve(engine) as server, connected(server) as client:
            await tokens_of(client, submit())
            await client.status()
            asked = engine.asked
            for _ in range(100):
                await client.status()
            assert engine.asked <= asked + 2

    async def test_status_is_the_gateways(self) -> None:
        engine = FakeEngine(paced=True)
        async with serve(engine) as server, connected(server) as client:
            running = asyncio.create_task(tokens_of(client, submit()))
            await asyncio.to_thread(engine.wait_until, lambda: engine.has_work)
            assert (await client.status()).running == 1
            engine.allow(5)
            await running
            assert (await client.status()).running == 0


class TestCancellation:
    async def test_closing_the_generator_cancels_the_sequence(self) -> None:
        engine = FakeEngine(paced=True)
        engine.allow(1)
        async with serve(engine) as server, connected(server) as client:
            async with aclosing(client.generate(submit(max_tokens=10**9))) as deltas:
                await anext(deltas)
            engine.stop_pacing()
            await in_engine(engine, "cancelled == 1")
            assert not engine.running
            assert client.sequences == 0

    async def test_cancelling_the_task_that_waits_cancels_the_sequence(self) -> None:
        engine = FakeEngine(paced=True)
        async with serve(engine) as server, connected(server) as client:
            task = asyncio.create_task(tokens_of(client, submit(max_tokens=10**9)))
            await asyncio.to_thread(engine.wait_until, lambda: engine.has_work)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            engine.stop_pacing()
            await in_engine(engine, "cancelled == 1")

    async def test_a_vanished_connection_cancels_its_sequences_and_no_others(self) -> None:
        engine = FakeEngine(paced=True)
        async with serve(engine) as server, connected(server) as stays:
            async with connected(server) as goes:
                lost = [asyncio.create_task(tokens_of(goes, submit(f"goes{n}", max_tokens=10**9))) for n in range(3)]
                kept = asyncio.create_task(tokens_of(stays, submit("stays", max_tokens=50)))
                await asyncio.to_thread(engine.wait_until, lambda: len(engine.submitted) >= 1)
                engine.allow(1)
                await asyncio.to_thread(engine.wait_until, lambda: len(engine.submitted) == 4)
            assert all(
                isinstance(error, GatewayLostError) for error in await asyncio.gather(*lost, return_exceptions=True)
            )
            engine.stop_pacing()
            await in_engine(engine, "cancelled == 3")
            assert await kept == expected((1, 2, 3), 50)

    async def test_leaving_the_server_cancels_what_ran(self) -> None:
        engine = FakeEngine(paced=True)
        async with connected_server(engine) as client:
            task = asyncio.create_task(tokens_of(client, submit()))
            await asyncio.to_thread(engine.wait_until, lambda: engine.has_work)
            engine.allow(1)
        with pytest.raises(GatewayLostError):
            await task
        assert not engine.running


@asynccontextmanager
async def connected_server(engine: FakeEngine) -> AsyncIterator[GatewayClient]:
    async with serve(engine) as server:
        client = await GatewayClient.connect(server.addresses[0], SECRET, MODEL)
        yield client
    await client.aclose()


class TestStrangers:
    async def test_a_wrong_secret_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serve(FakeEngine()) as server:
            with pytest.raises(HandshakeError, match="secret"):
                await GatewayClient.connect(server.addresses[0], b"another", MODEL)

    async def test_another_model_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serve(FakeEngine()) as server:
            with pytest.raises(HandshakeError, match="another model"):
                await GatewayClient.connect(server.addresses[0], SECRET, "fedcba")

    @pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200, bytes(200)])
    async def test_garbage_instead_of_a_handshake_harms_nobody(self, garbage: bytes) -> None:
        async with serve(FakeEngine()) as server, connected(server) as client:
            reader, writer = await framing.open_streams(server.addresses[0], 5.0)
            writer.write(garbage)
            assert await reader.read() == b""
            writer.close()
            assert await tokens_of(client, submit()) == expected((1, 2, 3), 5)

    @pytest.mark.parametrize("frame", [struct.pack("<I", framing.MAX_FRAME + 1), struct.pack("<I", 3) + b"\xc1??"])
    async def test_a_garbage_frame_ends_its_own_connection_only(self, frame: bytes) -> None:
        async with serve(FakeEngine()) as server, connected(server) as client:
            link = await framing.Link.connect(server.addresses[0], SECRET, MODEL, 5.0)
            link.send(frame)
            assert await link.receive() is None
            await link.aclose()
            assert await tokens_of(client, submit()) == expected((1, 2, 3), 5)

    async def test_nobody_listening_is_an_error_at_once(self) -> None:
        with pytest.raises(ConnectionRefusedError):
            await GatewayClient.connect("unix:@evermoe-nobody", SECRET, MODEL)

    async def test_an_oversized_message_is_not_sent(self) -> None:
        with pytest.raises(framing.LinkError, match="at most"):
            framing.pack(submit(prompt=(2**40,) * 2_000_000))


async def test_nothing_is_left_on_disk_and_the_address_is_free_again() -> None:
    async with serve(FakeEngine()) as server:
        name = sockets.parse(server.addresses[0])
        assert isinstance(name, str)
        assert name.startswith("\0")
    with socket.socket(socket.AF_UNIX) as again:
        again.bind(name)


async def test_a_reader_that_stops_reading_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_UNREAD", 1 << 16)
    engine = FakeEngine()
    async with serve(engine) as server:
        link = await framing.Link.connect(server.addresses[0], SECRET, MODEL, 5.0)
        link._reader._transport.pause_reading()  # type: ignore[attr-defined]
        for n in range(50):
            link.send(framing.pack(submit(f"{n}-" + secrets.token_hex(200), max_tokens=1_000_000)))
        await in_engine(engine, "cancelled == 50")
        await link.aclose()


def test_deltas_of_unknown_sequences_are_dropped() -> None:
    assert framing.from_gateway.decode(framing.pack(StepOutput(deltas=[Delta(request_id="x", token_ids=[1])]))[4:])
