"""A disk that cannot be used is said once, waited for, and said again when it works."""

from __future__ import annotations

import asyncio

import pytest

from fedge.edge_agent import storage_watch
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.schemas.errors import StoreError, StoreUnavailable


class Disk:
    """Refuses so many writes. `time_s` is what its clock, the loop's, shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusals: int) -> None:
        self.refusals = refusals
        self.delays_s: list[float] = []
        self.time_s = 0.0
        real = asyncio.sleep

        async def sleep(delay_s: float) -> None:
            self.delays_s.append(delay_s)
            self.time_s += delay_s
            await real(0)

        monkeypatch.setattr(storage_watch.asyncio, "sleep", sleep)
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: self.time_s)

    async def write(self) -> str:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("no space left")
        return "written"


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_write_is_tried_again_at_growing_intervals_until_it_works(monkeypatch, caplog) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        disk = Disk(monkeypatch, 10)
        trouble: list[str] = []
        watch = StorageWatch("d")
        done = await watch.until_done("blobs", disk.write, lambda error: trouble.append(str(error)))
        assert done == "written"
        assert disk.delays_s == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
        assert trouble == ["no space left"]

    asyncio.run(scenario())
    told = events(caplog)
    assert told[0] == "storage_unavailable"
    assert told[-1] == "storage_available"


def test_it_is_said_at_once_and_then_ever_more_rarely(monkeypatch, caplog) -> None:
    caplog.set_level("INFO")

    async def scenario() -> float:
        disk = Disk(monkeypatch, 2000)  # about 33 hours
        await StorageWatch("d").until_done("blobs", disk.write)
        return disk.time_s

    hours = asyncio.run(scenario()) / 3600
    told = events(caplog)
    # Minutes 0, 1, 3, 7, 15, 31, then once an hour.
    assert told.count("storage_unavailable") <= 7 + hours
    assert told.count("storage_unavailable") >= hours - 1
    assert told.count("storage_available") == 1


def test_a_small_write_that_fits_does_not_hide_a_large_one_that_does_not(
    monkeypatch, caplog
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        disk = Disk(monkeypatch, 1)
        watch = StorageWatch("d")

        def large() -> None:
            if disk.refusals:
                raise StoreUnavailable("no space left")

        assert not watch.attempt("receipt", large)
        for _ in range(5):
            assert watch.attempt("failures", lambda: None)
            assert not watch.attempt("receipt", large)
        assert events(caplog) == ["storage_unavailable"]
        disk.refusals = 0
        assert watch.attempt("receipt", large)
        assert events(caplog) == ["storage_unavailable", "storage_available"]

    asyncio.run(scenario())


def test_a_disk_that_works_is_not_worth_a_word(monkeypatch, caplog) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        watch = StorageWatch("d")
        assert watch.attempt("receipt", lambda: None)
        assert await watch.until_done("blobs", Disk(monkeypatch, 0).write) == "written"

    asyncio.run(scenario())
    assert events(caplog) == []


def test_what_will_not_pass_is_not_tried_again(monkeypatch) -> None:
    async def scenario() -> None:
        disk = Disk(monkeypatch, 0)

        async def broken() -> None:
            raise StoreError("damaged")

        with pytest.raises(StoreError, match="damaged"):
            await StorageWatch("d").until_done("blobs", broken)
        assert disk.delays_s == []

    asyncio.run(scenario())
