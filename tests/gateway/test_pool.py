"""A pool of gateways that come and go, over real sockets."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial

import msgspec
import pytest

from experts.wire import sockets
from gateway.link import GatewayLostError, GatewayPool, framing
from tests.gateway.fake_engine import MODEL, SECRET, FakeEngine, expected, serve, submit, tokens_of

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Ray Serve runs uvloop, which differs in sockets."""
    return "asyncio", {"use_uvloop": request.param}


class Relay:
    """A gateway's door that can be slammed: forwards bytes until `slam`."""

    def __init__(self, target: str, after_bytes: int | None = None) -> None:
        self._target = target
        self._left = after_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        listener = sockets.listen_unix()
        self.address = sockets.address_of(listener)
        self._server = await asyncio.start_unix_server(self._forward, sock=listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.slam()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def slam(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream = await framing.open_streams(self._target, 5.0)
        try:
            await asyncio.wait(
                [
                    asyncio.create_task(self._pump(reader, upstream[1], counted=False)),
                    asyncio.create_task(self._pump(upstream[0], writer, counted=True)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            writer.transport.abort()
            upstream[1].transport.abort()
            self._tasks.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, counted: bool) -> None:
        while data := await source.read(65536):
            if counted and self._left is not None:
                data, self._left = data[: self._left], self._left - len(data)
                sink.write(data)
                if self._left <= 0:
                    await sink.drain()
                    return
            else:
                sink.write(data)


class TestPool:
    async def test_a_stream_survives_the_loss_of_its_gateway(self) -> None:
        first, second = FakeEngine(paced=True), FakeEngine()
        listed: list[str] = []

        async def addresses() -> list[str]:
            return listed

        async with serve(first) as doomed, serve(second) as spare, Relay(doomed.addresses[0]) as relay:
            listed.append(relay.address)
            async with GatewayPool(addresses, SECRET, MODEL) as pool, aclosing(pool.generate(submit())) as deltas:
                first.allow(2)
                tokens = [*(await anext(deltas)).token_ids, *(await anext(deltas)).token_ids]
                listed[:] = spare.addresses
                relay.slam()
                async for delta in deltas:
                    tokens += delta.token_ids
                assert delta.finish_reason == "length"
        assert tokens == expected((1, 2, 3), 5)
        assert second.submitted[0].emitted == tokens[:2]

    async def test_a_deadline_goes_on_at_the_next_gateway(self) -> None:
        first, second = FakeEngine(paced=True), FakeEngine()
        listed: list[str] = []

        async def addresses() -> list[str]:
            return listed

        async with serve(first) as doomed, serve(second) as spare, Relay(doomed.addresses[0]) as relay:
            listed.append(relay.address)
            request = msgspec.structs.replace(submit(), deadline_s=50.0)
            async with GatewayPool(addresses, SECRET, MODEL) as pool, aclosing(pool.generate(request)) as deltas:
                first.allow(1)
                await anext(deltas)
                listed[:] = spare.addresses
                relay.slam()
                assert [delta async for delta in deltas][-1].finish_reason == "length"
        left = [request.deadline_s or 0.0 for request in (*first.submitted, *second.submitted)]
        assert 50 > left[0] > left[1] > 0

    @pytest.mark.parametrize("cut", [130, 160, 200, 300, 500, 900])
    async def test_wherever_the_connection_breaks_no_token_is_lost_or_doubled(self, cut: int) -> None:
        async with serve(FakeEngine()) as server, Relay(server.addresses[0], after_bytes=cut) as relay:
            listed = [[relay.address], server.addresses]

            async def addresses() -> list[str]:
                return listed.pop(0) if len(listed) > 1 else listed[0]

            async with GatewayPool(addresses, SECRET, MODEL) as pool:
                assert await tokens_of(pool, submit(max_tokens=40)) == expected((1, 2, 3), 40)

    async def test_a_gateway_that_hangs_is_left_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.link.client.SILENCE_S", 0.3)
        monkeypatch.setattr("gateway.link.server._BEAT_S", 0.02)
        hung = asyncio.Event()

        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await framing.Link.accept(reader, writer, SECRET, MODEL, 5.0)
            hung.set()
            await reader.read()
            writer.close()

        listener = sockets.listen_unix()
        listed = [sockets.address_of(listener)]

        async def addresses() -> list[str]:
            return listed

        async with (
            await asyncio.start_unix_server(hang, sock=listener),
            serve(FakeEngine()) as spare,
            GatewayPool(addresses, SECRET, MODEL) as pool,
        ):
            asking = asyncio.create_task(tokens_of(pool, submit()))
            await hung.wait()
            listed.append(spare.addresses[0])
            assert await asking == expected((1, 2, 3), 5)

    async def test_a_gateway_with_nothing_to_say_is_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gateway.link.client.SILENCE_S", 0.3)
        monkeypatch.setattr("gateway.link.server._BEAT_S", 0.02)
        engine = FakeEngine(paced=True)
        async with serve(engine) as server:

            async def addresses() -> list[str]:
                return server.addresses

            async with GatewayPool(addresses, SECRET, MODEL) as pool:
                asking = asyncio.create_task(tokens_of(pool, submit()))
                await asyncio.to_thread(engine.wait_until, lambda: engine.has_work)
                await asyncio.sleep(0.6)  # longer than the silence that counts
                engine.stop_pacing()
                assert await asking == expected((1, 2, 3), 5)
        assert len(engine.submitted) == 1

    async def test_a_request_waits_for_a_gateway_that_starts_late(self) -> None:
        listed: list[str] = []
        asked = asyncio.Event()

        async def addresses() -> list[str]:
            asked.set()
            return listed

        async with GatewayPool(addresses, SECRET, MODEL) as pool:
            waiting = asyncio.create_task(tokens_of(pool, submit()))
            await asked.wait()
            async with serve(FakeEngine()) as server:
                listed += server.addresses
                assert await waiting == expected((1, 2, 3), 5)

    async def test_patience_ends_with_one_sentence(self) -> None:
        async def addresses() -> list[str]:
            return ["unix:@evermoe-nobody"]

        async with GatewayPool(addresses, SECRET, MODEL, patience_s=0.1) as pool:
            with pytest.raises(
                GatewayLostError, match=r"^No gateway answered within 0\.1 s: .*evermoe-nobody"
            ) as caught:
                await tokens_of(pool, submit())
        assert "\n" not in str(caught.value)

    async def test_a_deadline_that_passes_without_a_gateway_is_told_as_such(self) -> None:
        async def addresses() -> list[str]:
            return []

        async with GatewayPool(addresses, SECRET, MODEL) as pool:
            request = msgspec.structs.replace(submit(), deadline_s=0.2)
            [delta] = [delta async for delta in pool.generate(request)]
        assert (delta.finish_reason, delta.error_status) == ("error", 504)

    async def test_a_request_that_takes_every_gateway_down_is_given_up(self) -> None:
        async def die_of_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = await framing.Link.accept(reader, writer, SECRET, MODEL, 5.0)
            await link.receive()
            link.abort()

        listener = sockets.listen_unix()

        async def addresses() -> list[str]:
            return [sockets.address_of(listener)]

        async with (
            await asyncio.start_unix_server(die_of_it, sock=listener),
            GatewayPool(addresses, SECRET, MODEL) as pool,
        ):
            with pytest.raises(GatewayLostError, match="3 gateways were lost"):
                await tokens_of(pool, submit())

    async def test_sequences_go_to_the_gateway_with_the_fewest(self) -> None:
        engines = [FakeEngine(paced=True), FakeEngine(paced=True)]
        async with serve(engines[0]) as one, serve(engines[1]) as two:

            async def addresses() -> list[str]:
                return [one.addresses[0], two.addresses[0]]

            async with GatewayPool(addresses, SECRET, MODEL) as pool:
                tasks = [asyncio.create_task(tokens_of(pool, submit(f"r{n}"))) for n in range(6)]
                for engine in engines:
                    await asyncio.to_thread(engine.wait_until, partial(getattr, engine, "has_work"))
                    engine.allow(100)
                await asyncio.gather(*tasks)
        assert [len(engine.submitted) for engine in engines] == [3, 3]

    @pytest.mark.parametrize("trouble", ["raises", "hangs"])
    async def test_a_directory_in_trouble_does_not_stop_a_pool_that_is_connected(
        self, trouble: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.link.pool._REFRESH_S", 0.0)
        monkeypatch.setattr("gateway.link.pool._FIRST_PAUSE_S", 0.0)
        asked = asyncio.Event()
        async with serve(FakeEngine()) as server:

            async def addresses() -> list[str]:
                if not pool.connected:
                    return server.addresses
                asked.set()
                if trouble == "hangs":
                    await asyncio.Event().wait()
                raise RuntimeError("Redis is gone")

            async with GatewayPool(addresses, SECRET, MODEL) as pool:
                for _ in range(2):
                    assert await tokens_of(pool, submit()) == expected((1, 2, 3), 5)
                await asked.wait()
                assert await tokens_of(pool, submit()) == expected((1, 2, 3), 5)
        assert ("Redis is gone" in caplog.text) == (trouble == "raises")

    async def test_status_lists_every_gateway(self) -> None:
        async with serve(FakeEngine()) as one, serve(FakeEngine()) as two:

            async def addresses() -> list[str]:
                return [one.addresses[0], two.addresses[0]]

            async with GatewayPool(addresses, SECRET, MODEL) as pool:
                assert len(await pool.status()) == 2
