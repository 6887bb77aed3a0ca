"""An update stays until its receipt; one that is lost is given up, once, and said so."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fedge.edge_agent import offers
from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.events import Event, UpdateLost
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import ExampleStore
from fedge.edge_agent.offers import Offers
from fedge.edge_agent.outbox import Outbox
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.messages import LossCurve, Offer, ReceiptStatus
from tests.edge_agent.small_disks import small_disk

UPDATE = bytes(range(256)) * 100


def offer(number: int, data: bytes = UPDATE, points: int = 1) -> Offer:
    return Offer(
        round=number,
        base=number - 1,
        update=describe(data),
        examples=10,
        steps=2,
        training_s=0.5,
        loss=LossCurve(by_epoch=(1.0,), by_batch=(1.0,) * points),
        metrics={},
    )


class Bench:
    """An outbox and its offers; `restart` is what a power cut and a new start do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: list[int] = []
        self.sent_thrice = asyncio.Event()
        self.fed: list[Event] = []
        self.stopped: list[str] = []
        self.chunk_bytes: int | None = None
        limits = ExampleLimits()
        self.store = ExampleStore(folder / "examples.sqlite", limits)
        self.typed = TypedTexts("d", DataConfig(path=folder / "examples.sqlite"), limits)
        self.restart()

    def restart(self) -> None:
        self.memory = AgentState(self.folder / "agent.sqlite")
        self.outbox = Outbox(self.memory, self.folder / "outbox", "d")
        self.offers = Offers(
            "d",
            self.outbox,
            storage=StorageWatch("d"),
            rng=random.Random(1),
            connected=lambda: True,
            fitting=self._fitting,
            send=self._send,
            stop=self.stopped.append,
            feed=self.fed.append,
            typed=self.typed,
        )

    async def _fitting(self, update: BlobRef, _path: Path) -> BlobRef:
        if self.chunk_bytes is None:
            return update
        return describe(UPDATE, self.chunk_bytes)

    def train(self, number: int, *, on_what_was_typed: bool = False) -> None:
        self.outbox.path(number).write_bytes(UPDATE)
        generation = self.typed.generation() if on_what_was_typed else None
        self.outbox.keep(offer(number), generation)

    async def _send(self, sent: Offer) -> None:
        self.offered_chunk_bytes = sent.update.chunk_bytes
        self.sent.append(sent.round)
        if len(self.sent) == 3:
            self.sent_thrice.set()

    def lost(self) -> list[int]:
        return [event.round for event in self.fed if isinstance(event, UpdateLost)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_update_is_offered_again_and_again_until_its_receipt(bench: Bench) -> None:
    async def scenario() -> None:
        bench.train(1)
        for _ in range(5):
            await bench.offers.offer(1)
        assert bench.sent == [1] * 5
        bench.outbox.settle(1, ReceiptStatus.ACCEPTED, None)
        bench.outbox.forget(1)
        await bench.offers.offer(1)
        assert bench.sent == [1] * 5
        assert list((bench.folder / "outbox").iterdir()) == []

    asyncio.run(scenario())


@pytest.mark.parametrize("restarted", [False, True])
def test_an_update_made_from_a_text_that_was_taken_back_is_never_offered_again(
    bench: Bench, restarted: bool
) -> None:
    async def scenario() -> None:
        number = bench.store.add("On my way home")
        bench.train(1, on_what_was_typed=True)
        bench.train(2)
        await bench.offers.offer(1)
        bench.store.forget_ids([number])
        bench.train(3, on_what_was_typed=True)
        if restarted:
            bench.restart()
        await bench.offers.withdraw()
        for each in (1, 2, 3):
            await bench.offers.offer(each)
        assert bench.sent == [1, 2, 3]
        assert bench.lost() == [1]
        assert bench.stopped == [offer(1).update.sha256]
        assert [line.status for line in bench.memory.ledger()] == ["lost", "offered", "offered"]
        assert bench.memory.outbox_generations().keys() == {3}

    asyncio.run(scenario())


def test_an_update_waits_while_nobody_can_say_whether_it_was_taken_back(bench: Bench) -> None:
    async def scenario() -> None:
        bench.train(1, on_what_was_typed=True)
        bench.store.close()
        store = bench.folder / "examples.sqlite"
        whole = store.read_bytes()
        store.write_bytes(b"no database" * 500)
        await bench.offers.offer(1)
        assert (bench.sent, bench.lost()) == ([], [])
        store.write_bytes(whole)
        await bench.offers.offer(1)
        assert bench.sent == [1]

    asyncio.run(scenario())


def unlink(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(UPDATE[:-1])


def rot(path: Path) -> None:
    path.write_bytes(UPDATE[:-1] + b"?")


@pytest.mark.parametrize("harm", [unlink, cut, rot])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_that_is_gone_or_damaged_is_given_up_and_not_offered_for_ever(
    bench: Bench, harm, restarted: bool
) -> None:
    async def scenario() -> None:
        bench.train(1)
        bench.train(2)
        await bench.offers.offer(1)
        harm(bench.outbox.path(1))
        if restarted:
            bench.restart()
        offered_before = bench.sent.count(1)
        for _ in range(10):
            for number in sorted(bench.outbox.rounds):
                await bench.offers.offer(number)
        assert bench.lost() == [1]
        assert bench.sent.count(1) == offered_before
        assert bench.sent.count(2) == 10
        assert bench.outbox.rounds == {2}
        assert [(p.round, p.status) for p in bench.memory.ledger()] == [(1, "lost"), (2, "offered")]

    asyncio.run(scenario())


def test_a_file_that_rots_later_is_found_out_too(bench: Bench) -> None:
    async def scenario() -> None:
        bench.train(1)
        for _ in range(5):
            await bench.offers.offer(1)
        rot(bench.outbox.path(1))
        for _ in range(100):
            await bench.offers.offer(1)
        assert bench.lost() == [1]
        assert len(bench.sent) == 7  # the file is read at the 8th offer

    asyncio.run(scenario())


def test_an_offer_that_cannot_be_read_is_given_up(bench: Bench) -> None:
    async def scenario() -> None:
        bench.train(1)
        bench.memory._run("UPDATE outbox SET offer = '{}'")
        bench.restart()
        assert bench.outbox.rounds == {1}
        await bench.offers.offer(1)
        assert (bench.lost(), bench.sent) == ([1], [])
        assert bench.outbox.rounds == frozenset()

    asyncio.run(scenario())


def test_the_sweep_removes_files_without_a_row_and_no_others(bench: Bench) -> None:
    bench.train(1)
    folder = bench.folder / "outbox"
    (folder / "2.safetensors").write_bytes(b"its row was never written")
    (folder / ".3.safetensors.part").write_bytes(b"half")
    bench.restart()
    bench.outbox.sweep()
    assert [path.name for path in folder.iterdir()] == ["1.safetensors"]


def test_a_receipt_that_cannot_be_written_down_leaves_the_update_where_it_is(tmp_path) -> None:
    with small_disk(tmp_path / "disk", 512 * 1024) as disk:
        bench = Bench(disk.folder)
        bench.train(1)
        disk.fill()
        fill_the_log(bench.memory)
        with pytest.raises(StoreUnavailable):
            bench.outbox.settle(1, ReceiptStatus.ACCEPTED, None)
        assert bench.outbox.rounds == {1}
        assert bench.outbox.damage(1) is None
        with pytest.raises(StoreUnavailable):
            bench.outbox.keep(offer(2, points=2000))
        assert bench.outbox.rounds == {1}
        disk.empty()
        bench.outbox.settle(1, ReceiptStatus.ACCEPTED, None)
        assert bench.outbox.rounds == frozenset()
        bench.memory.close()


def fill_the_log(memory: AgentState) -> None:
    """Writes until SQLite's log needs the next page of the disk."""
    for count in range(10_000):
        try:
            memory.keep_failures(count)
        except StoreUnavailable:
            return
    raise AssertionError("the disk is not full")


def test_offers_are_repeated_by_the_clock_and_only_while_connected(
    bench: Bench, monkeypatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(offers, "OFFER_AGAIN_S", 0.01)
        connected = False
        bench.offers._connected = lambda: connected
        bench.train(1)
        task = asyncio.create_task(bench.offers.run())
        await asyncio.sleep(0.1)
        assert bench.sent == []
        connected = True
        await asyncio.wait_for(bench.sent_thrice.wait(), 30)
        task.cancel()

    asyncio.run(scenario())


def test_an_update_is_offered_in_chunks_that_the_broker_takes(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        bench.train(1)
        bench.chunk_bytes = 4096
        await bench.offers.offer(1)
        assert bench.offered_chunk_bytes == 4096
        # Grants are for what was offered, also after a restart.
        bench.restart()
        kept = bench.outbox.offer(1)
        assert kept is not None
        assert kept.update.chunk_bytes == 4096

    asyncio.run(scenario())


def test_what_was_accepted_stays_accepted_in_the_ledger(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.train(1)
    bench.outbox.settle(1, ReceiptStatus.ACCEPTED, None)
    bench.train(1)
    assert [line.status for line in bench.memory.ledger()] == ["accepted"]
    assert bench.memory.newest_round() == 1
