"""Downloads from a broker that loses, repeats, delays, damages and forgets what it keeps.

The real `Downloads` of a device, over a session at the broker in memory, into a real folder; in
virtual time. The coordinator of this model has the blobs, puts them on the broker when it is asked
to, and may be away. The claims:

1.  A blob that is there is what it should be, byte for byte.
2.  A chunk that was verified is never written again, nor subscribed to again, also after a restart.
3.  No more than the window is subscribed to at a time.
4.  Nothing on the network ends a download; what the disk refuses ends it and loses nothing.
5.  Once the faults end, what is wanted comes within a bounded time.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.edge_agent import download
from fedge.edge_agent.download import PATIENCE_S, Downloads
from fedge.schemas.blob_files import BlobDirectory
from fedge.schemas.blobs import ChunkSet, describe
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.link.memory import NO_FAULTS, Faults, MemoryLink
from fedge.schemas.link.protocol import Delivery
from fedge.schemas.messages import Need
from fedge.schemas.topics import Topics, parse
from tests.model.profile import search
from tests.model.scratch import scratch_folder
from tests.model.world import World
from tests.model.written_chunks import WrittenChunks

CHUNK_BYTES = 1024
WINDOW = 4
CLIENT = "device.bulk"
TOPICS = Topics("model")
BAD_NETWORKS = (
    Faults(drop=0.3),
    Faults(duplicate=0.5, reorder=0.5),
    Faults(delay_s=8.0),
    Faults(drop=0.1, duplicate=0.2, reorder=0.3, delay_s=15.0),
)


class WatchedLink:
    """The device's session, and what it subscribes to."""

    def __init__(self, link: MemoryLink, model: DownloadModel) -> None:
        self._link = link
        self._model = model
        self.next_event, self.ack = link.next_event, link.ack
        self.unsubscribe = link.unsubscribe

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def subscribe(self, *filters: str) -> None:
        await self._link.subscribe(*filters)
        for topic in filters:
            address = parse(topic)
            if address.chunk in self._model.writes.of(self._model.refs[address.sha256 or ""]):
                self._model.broken.append(f"{topic} is asked for again")
        if len(self._link._filters) > WINDOW:
            self._model.broken.append(f"{len(self._link._filters)} subscriptions")


class DownloadModel(RuleBasedStateMachine):
    """One device, some blobs, and a broker that knows no mercy."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = scratch_folder()
        self.writes = WrittenChunks()
        self.window = mock.patch.object(download, "WINDOW_CHUNKS", WINDOW)
        self.window.start()
        self.broken: list[str] = []
        self.needs: list[Need] = []
        self.coordinator_is_there = True
        self.running = True
        self.fetching: asyncio.Task[None] | None = None
        self.blobs: dict[str, bytes] = {}

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        sizes=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    )
    def begin(self, seed: int, sizes: list[int]) -> None:
        rng = random.Random(seed)
        self.world = World(rng)
        for size in sizes:
            data = rng.randbytes(size * CHUNK_BYTES - 100)
            self.blobs[describe(data, CHUNK_BYTES).sha256] = data
        self.refs = {sha: describe(data, CHUNK_BYTES) for sha, data in self.blobs.items()}
        self.coordinator = self.world.process()
        self.coordinator.link("coordinator.bulk")
        self.coordinator.loop.begin(self.coordinator.links[0].start())
        self._seed_the_broker()
        self._start()

    def teardown(self) -> None:
        try:
            if self.blobs:
                self.everything_wanted_comes_once_the_faults_end()
        finally:
            self.window.stop()
            self.writes.close()
            if self.blobs:
                self.world.end()
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        self.process = self.world.process(work_s=0.5)
        link = WatchedLink(self.process.link(CLIENT), self)
        directory = BlobDirectory(self.folder)
        directory.sweep()
        self.downloads = Downloads(link, TOPICS, directory, self._ask)
        self.fetching = None
        self.process.loop.begin(self._read(link))
        self.process.loop.begin(self.process.links[0].start())
        self.world.settle()

    async def _read(self, link: WatchedLink) -> None:
        while True:
            event = await link.next_event()
            if isinstance(event, Delivery):
                address = parse(event.topic)
                self.downloads.received(address.sha256 or "", address.chunk or 0, event.payload)
                link.ack(event)

    async def _ask(self, need: Need) -> None:
        self.needs.append(need)

    # ------------------------------------------------------------ the device

    @precondition(lambda self: self.fetching is None)
    @rule()
    def fetch(self) -> None:
        self.fetching = self.process.loop.begin(self.downloads.fetch(self.refs.values()))
        self.world.settle()
        self._look()

    @precondition(lambda self: self.fetching is not None)
    @rule()
    def give_up(self) -> None:
        self.fetching.cancel()
        # The thread that was finishing a file is waited for.
        self.pass_time(2.0)
        assert self.fetching is None, "a download that was cancelled goes on"

    @rule()
    def the_device_is_killed_and_starts(self) -> None:
        self.world.kill(self.process)
        self._start()

    @rule(refuses=st.booleans())
    def the_disk(self, refuses: bool) -> None:
        self.writes.disk_refuses = refuses

    # ------------------------------------------------------------ the network

    @rule(seconds=st.sampled_from([0.3, 3.0, PATIENCE_S, 3 * PATIENCE_S]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        if self.coordinator_is_there:
            self._repeat_what_is_needed()
        self._look()

    @rule(faults=st.sampled_from([NO_FAULTS, *BAD_NETWORKS]))
    def the_network_is(self, faults: Faults) -> None:
        self.world.broker.faults = faults

    @rule(up=st.booleans())
    def the_connection(self, up: bool) -> None:
        if up:
            self.world.reconnect(CLIENT)
        else:
            self.world.cut_off(CLIENT)
        self.world.settle()

    @rule(up=st.booleans())
    def the_broker(self, up: bool) -> None:
        if up and not self.running:
            self.world.broker.start()
        elif self.running and not up:
            self.world.broker.kill()
        self.running = up
        self.world.settle()

    @rule(there=st.booleans())
    def the_coordinator(self, there: bool) -> None:
        self.coordinator_is_there = there
        if there:
            self._seed_the_broker()

    @rule(place=st.integers(0, 40), payload=st.sampled_from([b"", b"?", b"?" * CHUNK_BYTES]))
    def a_stranger_puts_something_else_in_its_place(self, place: int, payload: bytes) -> None:
        chunks = [(ref.sha256, i) for ref in self.refs.values() for i in range(ref.chunk_count)]
        sha, index = chunks[place % len(chunks)]
        self._publish(sha, index, payload)
        self.world.settle()

    def _seed_the_broker(self) -> None:
        for ref in self.refs.values():
            everything = ChunkSet(ref.chunk_count, range(ref.chunk_count))
            self._publish_chunks(ref.sha256, everything)
        self.world.settle()

    def _repeat_what_is_needed(self) -> None:
        needs, self.needs = self.needs, []
        for need in needs:
            missing = ChunkSet.decode(need.missing, self.refs[need.sha256].chunk_count)
            self._publish_chunks(need.sha256, missing)
        self.world.settle()

    def _publish_chunks(self, sha: str, wanted: ChunkSet) -> None:
        for index in range(wanted.chunk_count):
            if index in wanted:
                start = index * CHUNK_BYTES
                self._publish(sha, index, self.blobs[sha][start : start + CHUNK_BYTES])

    def _publish(self, sha: str, index: int, payload: bytes) -> None:
        link, loop = self.coordinator.links[0], self.coordinator.loop
        loop.begin(link.publish(TOPICS.chunk(sha, index), payload, retain=True))

    # ------------------------------------------------------------ the claims

    def _look(self) -> None:
        if self.fetching is None or not self.fetching.done():
            return
        done, self.fetching = self.fetching, None
        if done.cancelled():
            return
        error = done.exception()
        assert error is None or isinstance(error, StoreUnavailable), error
        assert error is not None or all(BlobDirectory(self.folder).has(sha) for sha in self.blobs)

    @invariant()
    def what_is_there_is_what_it_should_be(self) -> None:
        directory = BlobDirectory(self.folder)
        for digest in directory.digests():
            assert directory.read(digest) == self.blobs[digest]

    @invariant()
    def no_verified_chunk_is_asked_for_or_written_again(self) -> None:
        assert not self.broken
        assert not self.writes.broken

    def everything_wanted_comes_once_the_faults_end(self) -> None:
        self.the_network_is(NO_FAULTS)
        self.the_disk(refuses=False)
        self.the_broker(up=True)
        self.the_connection(up=True)
        self.the_coordinator(there=True)
        # What is still delayed, and one patience for each chunk that has to be asked for.
        for _ in range(5 + sum(ref.chunk_count for ref in self.refs.values())):
            if self.fetching is None:
                self.fetch()
            if all(BlobDirectory(self.folder).has(sha) for sha in self.blobs):
                break
            self.pass_time(2 * PATIENCE_S)
        else:
            raise AssertionError("a download does not end, though nothing is in its way")
        self.what_is_there_is_what_it_should_be()
        self.no_verified_chunk_is_asked_for_or_written_again()


TestDownloads = DownloadModel.TestCase
TestDownloads.settings = search(examples=60, steps=30, deep_examples=4_000, deep_steps=60)
