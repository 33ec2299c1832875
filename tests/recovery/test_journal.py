"""The journal of requests under way, in a real Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery import journal
from recovery.journal import Journal, Kept
from recovery.redis_server import RedisServer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_FLUSH_S", 0.005)
    monkeypatch.setattr(journal, "_PAUSE_S", 0.02)


async def until_kept(journal: Journal, place: str, tokens: list[int]) -> None:
    async with asyncio.timeout(10):
        while (kept := await journal.find(place)) is None or kept.tokens != tokens:
            await asyncio.sleep(0.005)


async def test_what_is_under_way_is_found_by_another_process_and_what_has_ended_is_not(redis_url: str) -> None:
    async with Journal(redis_url, "one") as mine, Journal(redis_url, "one") as other:
        with mine.entry("a", b"asked") as entry:
            entry.add([1, 2])
            await until_kept(other, "a", [1, 2])
            entry.add([70_000])
            await until_kept(other, "a", [1, 2, 70_000])
            assert (await other.find("a") or Kept(b"", [], "")).asked == b"asked"
            assert await other.find("b") is None
    async with Journal(redis_url, "one") as other:
        assert await other.find("a") is None


async def test_a_later_attempt_is_not_disturbed_by_an_earlier_one(redis_url: str) -> None:
    async with Journal(redis_url, "two") as first, Journal(redis_url, "two") as second:
        with first.entry("a", b"asked") as slow:
            slow.add([1])
            await until_kept(second, "a", [1])
            with second.entry("a", b"asked", [1]) as quick:
                quick.add([2])
                await until_kept(first, "a", [1, 2])
                slow.add([9])
                await asyncio.sleep(0.05)
                assert (await first.find("a") or Kept(b"", [], "")).tokens == [1, 2]
                slow.ended = True
                await asyncio.sleep(0.05)
                assert (await first.find("a") or Kept(b"", [], "")).tokens == [1, 2]


async def test_the_end_of_an_attempt_is_the_end_of_the_one_before(redis_url: str) -> None:
    """Also of one that ended before it was written at all."""
    async with Journal(redis_url, "before") as first, Journal(redis_url, "before") as second:
        with first.entry("a", b"asked") as lost:
            lost.add([1])
            await until_kept(second, "a", [1])
            kept = await second.find("a")
            assert kept is not None
            with second.entry("a", b"asked", kept.tokens, kept.attempt):
                pass
            async with asyncio.timeout(10):
                while await second.find("a") is not None:
                    await asyncio.sleep(0.005)


async def test_a_redis_that_comes_back_empty_is_told_everything_again(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    server = RedisServer(folder).__enter__()
    async with Journal(server.url, "three") as mine:
        with mine.entry("a", b"asked") as entry:
            entry.add([1, 2])
            await until_kept(mine, "a", [1, 2])
            server.__exit__()
            entry.add([3])
            assert await mine.find("a") is None
            with RedisServer(folder):
                entry.add([4])
                await until_kept(mine, "a", [1, 2, 3, 4])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 200_000), max_size=5), max_size=12))
def test_tokens_are_kept_in_order_however_they_are_flushed(redis_url: str, parts: list[list[int]]) -> None:
    async def run() -> None:
        async with Journal(redis_url, "four") as mine:
            with mine.entry("a", b"asked") as entry:
                for part in parts:
                    entry.add(part)
                    while entry.written < len(entry.tokens):
                        await asyncio.sleep(0.001)
                kept = await mine.find("a")
                if parts:
                    assert kept is not None
                    assert kept.tokens == [token for part in parts for token in part]

    asyncio.run(run())
