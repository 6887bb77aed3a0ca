"""Downloads resume: what was verified once is never asked for again, whatever happened between."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.edge_agent.download import WINDOW_CHUNKS, Downloads
from fedge.schemas import topics
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef, ChunkSet, chunks_of, describe
from fedge.schemas.errors import PeerError, StoreUnavailable
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.memory import MemoryBroker, MemoryLink
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import Need
from fedge.schemas.topics import Topics
from tests.brokers import MosquittoBroker
from tests.edge_agent.small_disks import small_disk

NAMES = Topics("p")
CHUNK = 1024
DATA = random.Random(5).randbytes(200 * CHUNK + 77)
REF = describe(DATA, CHUNK)


class Bench:
    """A device's downloads from a broker in memory. `asked`: how often each chunk was."""

    def __init__(self, folder: Path, broker: MemoryBroker | None = None) -> None:
        self.folder = folder
        self.broker = broker or MemoryBroker(random.Random(1))
        self.asked: Counter[tuple[str, int]] = Counter()
        self.needs: list[Need] = []
        self.link = self.broker.link(f"d{id(self)}")
        self.blobs = BlobDirectory(folder)
        self.downloads = Downloads(self._recorded(), NAMES, self.blobs, self._need, patience_s=0.05)
        self.arrived = asyncio.Event()
        self.needed = asyncio.Event()
        self._stop_after = 10**9
        self._seen = 0

    def _recorded(self) -> MemoryLink:
        subscribe = self.link.subscribe

        async def recorded(*filters: str) -> None:
            for each in filters:
                address = topics.parse(each)
                self.asked[(address.sha256, address.chunk)] += 1
            await subscribe(*filters)

        self.link.subscribe = recorded  # type: ignore[method-assign]
        return self.link

    async def _need(self, need: Need) -> None:
        self.needs.append(need)
        self.needed.set()

    async def keep(self, data: bytes, only: range | None = None) -> BlobRef:
        """Retains a blob's chunks at the broker."""
        ref = describe(data, CHUNK)
        for index, chunk in enumerate(chunks_of(data, CHUNK)):
            if only is None or index in only:
                await self.retain(NAMES.chunk(ref.sha256, index), bytes(chunk))
        return ref

    async def retain(self, topic: str, payload: bytes) -> None:
        publisher = self.broker.link("publisher")
        await publisher.start()
        await publisher.publish(topic, payload, retain=True)
        await publisher.close()

    async def read(self) -> None:
        """What the agent's reader does, until `stop_after` chunks came: then nothing moves."""
        while True:
            event = await self.link.next_event()
            if isinstance(event, Delivery):
                if self._seen >= self._stop_after:
                    self.arrived.set()
                    await asyncio.Event().wait()
                self._seen += 1
                address = topics.parse(event.topic)
                self.downloads.received(address.sha256, address.chunk, event.payload)
                self.link.ack(event)

    @contextlib.asynccontextmanager
    async def running(self, stop_after: int = 10**9) -> AsyncIterator[None]:
        self._stop_after, self._seen = stop_after, 0
        await self.link.start()
        reader = asyncio.create_task(self.read())
        try:
            yield
        finally:
            reader.cancel()


def held_in(folder: Path, ref: BlobRef) -> set[int]:
    """The chunks that are right in what has arrived: found out here, without our own reader."""
    whole, part = folder / ref.sha256, folder / (ref.sha256 + ".part")
    if whole.exists():
        return set(range(ref.chunk_count))
    if not part.exists():
        return set()
    data = part.read_bytes()
    chunks = [data[i * CHUNK : i * CHUNK + ref.chunk_size(i)] for i in range(ref.chunk_count)]
    return {i for i, chunk in enumerate(chunks) if ref.is_chunk(i, chunk)}


def run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))  # type: ignore[operator]


def test_each_chunk_is_asked_for_once_and_nothing_stays_subscribed(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        await bench.keep(DATA)
        async with bench.running():
            await bench.downloads.fetch([REF])
        assert bench.blobs.read(REF.sha256) == DATA
        assert set(bench.asked.values()) == {1}
        assert len(bench.asked) == REF.chunk_count
        assert list(bench.link._filters) == []
        assert bench.downloads.received_bytes == len(DATA)

    run(scenario)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kills=st.lists(st.integers(0, 120), min_size=1, max_size=4), torn=st.booleans())
def test_a_kill_at_any_moment_costs_no_chunk_that_was_verified(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], torn: bool
) -> None:
    async def scenario() -> None:
        broker = MemoryBroker(random.Random(1))
        folder = tmp_path_factory.mktemp("life")
        for stop_after in kills:
            held = held_in(folder, REF)
            bench = Bench(folder, broker)
            await bench.keep(DATA)
            async with bench.running(stop_after):
                fetch = asyncio.create_task(bench.downloads.fetch([REF]))
                stopped = asyncio.create_task(bench.arrived.wait())
                await asyncio.wait([fetch, stopped], return_when=asyncio.FIRST_COMPLETED)
                # What a killed process leaves: its files as they are, and no goodbye.
                folder = tmp_path_factory.mktemp("life")
                shutil.copytree(bench.folder, folder, dirs_exist_ok=True)
                for task in (fetch, stopped):
                    task.cancel()
                await asyncio.gather(fetch, stopped, return_exceptions=True)
            assert not {index for _, index in bench.asked} & held
            part = folder / (REF.sha256 + ".part")
            if torn and part.exists():
                tear(part, max(held_in(folder, REF), default=0))
        held = held_in(folder, REF)
        last = Bench(folder, broker)
        async with last.running():
            await last.downloads.fetch([REF])
        assert {index for _, index in last.asked} == set(range(REF.chunk_count)) - held
        assert last.blobs.read(REF.sha256) == DATA

    run(scenario)


def tear(part: Path, index: int) -> None:
    """A power cut amid a write: half of a chunk is on the disk."""
    with part.open("r+b") as file:
        file.seek(index * CHUNK + CHUNK // 2)
        file.write(b"\0" * (CHUNK // 2))


def test_a_version_that_supersedes_another_keeps_what_they_have_in_common(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        common = await bench.keep(DATA)
        old = await bench.keep(random.Random(1).randbytes(50 * CHUNK))
        new = await bench.keep(random.Random(2).randbytes(50 * CHUNK))
        async with bench.running(stop_after=90):
            first = asyncio.create_task(bench.downloads.fetch([common, old]))
            await bench.arrived.wait()
            # As the agent does: the older fetch is given up, the newer one begins at once.
            first.cancel()
            second = asyncio.create_task(bench.downloads.fetch([common, new]))
            await asyncio.sleep(0)
            held = held_in(tmp_path, common)
            assert len(held) == 90
            asked_before = Counter(bench.asked)
            bench._stop_after = 10**9
            reader = asyncio.create_task(bench.read())
            await second
            reader.cancel()
            await asyncio.gather(first, return_exceptions=True)
        again = bench.asked - asked_before
        assert not {index for sha, index in again if sha == common.sha256} & held
        assert bench.blobs.has(new.sha256)
        assert not {sha for sha, _ in again} & {old.sha256}

    run(scenario)


def test_a_broker_that_forgot_everything_costs_no_chunk_that_was_verified(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        await bench.keep(DATA, range(70))
        async with bench.running():
            fetch = asyncio.create_task(bench.downloads.fetch([REF]))
            # Its patience is over: whatever the broker had is here.
            await bench.needed.wait()
            bytes_before = bench.downloads.received_bytes
            assert bytes_before == 70 * CHUNK
            bench.broker.kill()
            bench.broker.start()
            bench.needed.clear()
            await bench.needed.wait()
            missing = ChunkSet.decode(bench.needs[-1].missing, REF.chunk_count)
            assert not [index for index in range(70) if index in missing]
            await bench.keep(DATA)
            await fetch
        assert bench.downloads.received_bytes - bytes_before == len(DATA) - 70 * CHUNK
        assert not [count for (_, index), count in bench.asked.items() if index < 70 and count > 1]

    run(scenario)


def test_while_the_disk_is_full_one_chunk_is_tried_and_then_the_rest_follows(tmp_path) -> None:
    async def scenario() -> None:
        with small_disk(tmp_path / "disk", 512 * 1024) as disk:
            bench = Bench(disk.folder / "blobs")
            await bench.keep(DATA)
            disk.fill(leave_bytes=100 * 1024)
            async with bench.running():
                with pytest.raises(StoreUnavailable, match="No space left"):
                    await bench.downloads.fetch([REF])
                held = held_in(bench.folder, REF)
                assert 50 < len(held) < REF.chunk_count
                for _ in range(5):
                    asked_before = bench.asked.total()
                    with pytest.raises(StoreUnavailable):
                        await bench.downloads.fetch([REF])
                    assert bench.asked.total() - asked_before == 1
                    assert list(bench.link._filters) == []
                disk.empty()
                await bench.downloads.fetch([REF])
            assert bench.blobs.read(REF.sha256) == DATA
            assert not [index for (_, index), n in bench.asked.items() if n > 1 and index in held]
            # Chunks that the full disk refused were asked for again, and no more than a window.
            assert bench.asked.total() - REF.chunk_count <= WINDOW_CHUNKS + 5

    run(scenario)


def test_a_wrong_chunk_changes_nothing_and_the_right_one_is_still_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        await bench.keep(DATA)
        await bench.retain(NAMES.chunk(REF.sha256, 3), b"\0" * CHUNK)
        async with bench.running():
            fetch = asyncio.create_task(bench.downloads.fetch([REF]))
            await bench.needed.wait()
            assert list(ChunkSet.decode(bench.needs[0].missing, REF.chunk_count).missing()) == [
                index for index in range(REF.chunk_count) if index != 3
            ]
            await bench.keep(DATA, range(3, 4))
            await fetch
        assert bench.blobs.read(REF.sha256) == DATA

    run(scenario)


def test_a_reference_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        await bench.keep(DATA)
        lie = REF.model_copy(update={"sha256": "0" * 64})
        for index, chunk in enumerate(chunks_of(DATA, CHUNK)):
            await bench.retain(NAMES.chunk(lie.sha256, index), bytes(chunk))
        async with bench.running():
            with pytest.raises(PeerError, match="digest_mismatch"):
                await bench.downloads.fetch([lie])

    run(scenario)
    assert list(tmp_path.iterdir()) == []


def test_what_a_round_needs_waits_for_no_other_blob(tmp_path: Path) -> None:
    """Not for one that is nowhere, nor for a large one; both go on with what they had."""

    async def scenario() -> None:
        bench = Bench(tmp_path)
        nowhere, wanted = b"nowhere" * 999, [b"a round's" * 999, b"another of it" * 99]
        await bench.keep(DATA, only=range(50))
        urgent = [await bench.keep(data) for data in wanted]
        async with bench.running():
            others = [
                asyncio.create_task(bench.downloads.fetch([ref]))
                for ref in (REF, describe(nowhere, CHUNK))
            ]
            # Chunks of the first are missing, and the second waits behind it.
            await asyncio.wait_for(bench.needed.wait(), 10)
            async with asyncio.timeout(10):
                await asyncio.gather(
                    *(bench.downloads.fetch([ref], for_a_round=True) for ref in urgent)
                )
            assert [bench.blobs.read(ref.sha256) for ref in urgent] == wanted
            assert not any(other.done() for other in others)
            await bench.keep(DATA)
            await bench.keep(nowhere)
            async with asyncio.timeout(10):
                await asyncio.gather(*others)
        assert bench.blobs.read(REF.sha256) == DATA
        # What had arrived before was not asked for again.
        assert {bench.asked[REF.sha256, index] for index in range(50)} == {1}
        assert list(bench.link._filters) == []

    run(scenario)


def test_a_fetch_that_is_cancelled_while_it_waits_for_a_round_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        async with bench.running():
            hurries = asyncio.create_task(bench.downloads.fetch([REF], for_a_round=True))
            await asyncio.wait_for(bench.needed.wait(), 10)
            other = asyncio.create_task(bench.downloads.fetch([describe(b"small", CHUNK)]))
            await asyncio.sleep(0)
            for task in (other, hurries):
                task.cancel()
                await asyncio.wait({task})
            # Nothing is held up by what was given up.
            ref = await bench.keep(b"small")
            async with asyncio.timeout(10):
                await bench.downloads.fetch([ref])
        assert bench.blobs.read(ref.sha256) == b"small"

    run(scenario)


DOWNLOADER = """
import asyncio, json, random, sys
from pathlib import Path
from fedge.edge_agent.download import Downloads
from fedge.schemas import topics
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import BlobRef
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery

async def main(port, folder, ref):
    link = BrokerSettings(port=port).link("downloader", random.Random(1))
    async def need(message):
        pass
    downloads = Downloads(link, topics.Topics("p"), BlobDirectory(Path(folder)), need)
    async def read():
        while True:
            event = await link.next_event()
            if isinstance(event, Delivery):
                address = topics.parse(event.topic)
                downloads.received(address.sha256, address.chunk, event.payload)
                link.ack(event)
                print(address.chunk, flush=True)
                await asyncio.sleep(0.001)
    await link.start()
    reader = asyncio.create_task(read())
    await downloads.fetch([BlobRef.model_validate_json(ref)])
    print("done", flush=True)

asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


@pytest.mark.e2e
def test_a_real_process_killed_five_times_asks_a_real_broker_for_no_chunk_twice(
    tmp_path: Path,
) -> None:
    rng = random.Random(11)
    folder = tmp_path / "blobs"
    with MosquittoBroker(tmp_path / "broker") as broker:
        publish(broker.port)
        for life in range(6):
            held = held_in(folder, REF) if folder.exists() else set()
            log_before = broker.log_path.stat().st_size
            stop_after = rng.randrange(1, 40) if life < 5 else 10**9
            process = subprocess.Popen(
                [sys.executable, "-c", DOWNLOADER, str(broker.port), str(folder),
                 REF.model_dump_json()],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            with process:
                assert process.stdout is not None
                for count, line in enumerate(process.stdout, start=1):
                    if count >= stop_after or line == "done\n":
                        break
                process.kill()
            asked = subscriptions(broker.log_path, log_before)
            assert asked, "the broker's log shows no subscription: the test sees nothing"
            assert not asked & held, f"life {life}: verified chunks were asked for again"
        assert asked == set(range(REF.chunk_count)) - held
    assert BlobDirectory(folder).read(REF.sha256) == DATA


def publish(port: int) -> None:
    async def work() -> None:
        link = BrokerSettings(port=port).link("publisher", random.Random(2))
        await link.start()
        for index, chunk in enumerate(chunks_of(DATA, CHUNK)):
            await link.publish(NAMES.chunk(REF.sha256, index), bytes(chunk), retain=True)
        await link.close()

    asyncio.run(work())


def subscriptions(log: Path, start: int) -> set[int]:
    """The chunks subscribed to since `start`, from Mosquitto's own log."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode()
    return {
        int(index)
        for index in re.findall(rf"\t{NAMES.prefix}/blob/{REF.sha256}/(\d+) \(QoS 1\)", text)
    }
