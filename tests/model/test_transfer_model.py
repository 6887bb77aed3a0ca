"""Uploads over channels that lose, repeat, delay, overtake and damage what they carry.

The real `Uploads` of some devices against the real `UploadDesk`, with files in a folder. Hypothesis
decides the fate of every message between them, and when either side is killed: its objects are
thrown away, files and what was recorded stay. Time is the model's. The claims:

1.  What arrives in the end is what was sent, byte for byte.
2.  A chunk that was verified is never written again, nor asked for again, also after a restart.
3.  No sender has more than the window on its way beyond what it was told that the receiver has.
4.  The desk never has more slots granted than it has, so the credit is within `slots * window`.
5.  A complete upload is handed over once in a life of the desk, and recorded once in all of them.
6.  Once the faults end, every transfer completes within a bounded number of steps.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.coordinator.uploads import Upload, UploadDesk
from fedge.edge_agent.upload import Uploads
from fedge.schemas.blobs import BlobRef, ChunkSet, describe
from fedge.schemas.errors import PeerError, StoreUnavailable
from fedge.schemas.messages import Grant, Have, LossCurve, Offer
from fedge.schemas.topics import Topics, parse
from tests.model.profile import search
from tests.model.scratch import scratch_folder
from tests.model.virtual_time import Clock, VirtualLoop
from tests.model.written_chunks import WrittenChunks

CHUNK_BYTES = 1024
OFFER_AGAIN_S = 30.0
SILENCE_S = 15.0
TOPICS = Topics("model")
CHANNELS = st.sampled_from(["up", "down", "chunks"])
PLACES = st.integers(0, 2)


def bytes_of(chunks: int, seed: int) -> bytes:
    """So many chunks, the last one short."""
    return random.Random(seed).randbytes(chunks * CHUNK_BYTES - 100)


def offer_of(number: int, update: BlobRef) -> Offer:
    return Offer(
        round=number,
        base=0,
        update=update,
        examples=1,
        steps=1,
        training_s=1.0,
        loss=LossCurve(),
        metrics={},
    )


@dataclass
class Sender:
    """A device: its outbox survives, everything else is one life's."""

    name: str
    number: int
    data: bytes
    path: Path
    online: bool = True
    slow: bool = False
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    receipted: bool = False
    uploads: Any = None
    told: ChunkSet | None = None
    on_the_way: set[int] = field(default_factory=set)
    window: int = 0

    @property
    def ref(self) -> BlobRef:
        return describe(self.data, CHUNK_BYTES)

    @property
    def offer(self) -> Offer:
        return offer_of(self.number, self.ref)


class DeviceLink:
    """What `Uploads` publishes over: into the channel while the device is online, else it waits.

    Where the network is slow, the broker's acknowledgement takes its time, too.
    """

    def __init__(self, model: UploadModel, sender: Sender) -> None:
        self._model = model
        self._sender = sender

    async def publish(self, topic: str, payload: bytes) -> None:
        while not self._sender.online:
            await self._wait()
        self._model.published(self._sender, topic, payload)
        if self._sender.slow:
            await self._wait()

    async def _wait(self) -> None:
        waiting = self._model.loop.create_future()
        self._sender.waiting.append(waiting)
        await waiting


Letter = tuple[str, Any]
"""A device and what it says or is told: an offer, a grant, a have, a chunk or a receipt."""


class UploadModel(RuleBasedStateMachine):
    """Devices, the desk, and three channels in which nothing is safe."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = scratch_folder()
        self.writes = WrittenChunks()
        self.clock = Clock()
        self.loop = VirtualLoop(self.clock)
        self.channels: dict[str, list[Letter]] = {"up": [], "down": [], "chunks": []}
        self.complete: list[Upload] = []
        self.handed_over: list[Upload] = []
        self.recorded: dict[tuple[int, str], bytes] = {}
        self.senders: list[Sender] = []
        self.broken: list[str] = []
        self.made = 0

    @initialize(
        slots=st.integers(1, 3),
        window=st.integers(1, 5),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    )
    def begin(self, slots: int, window: int, sizes: list[int]) -> None:
        self.slots, self.window = slots, window
        self.senders = [
            Sender(f"d{i}", 1, bytes_of(size, i), self.folder / f"outbox-{i}")
            for i, size in enumerate(sizes)
        ]
        for sender in self.senders:
            sender.path.write_bytes(sender.data)
            self._start(sender)
        self._start_desk()

    def teardown(self) -> None:
        try:
            if self.senders:
                self.everything_arrives_once_the_faults_end()
        finally:
            self.loop.bury()
            self.writes.close()
            shutil.rmtree(self.folder)

    def _start(self, sender: Sender) -> None:
        sender.uploads = Uploads(DeviceLink(self, sender), TOPICS, sender.name)
        sender.told, sender.on_the_way, sender.window = None, set(), 0

    def _start_desk(self) -> None:
        self.desk = UploadDesk(
            self.folder / "desk", slots=self.slots, window=self.window, silence_s=SILENCE_S
        )
        self.complete, self.handed_over = [], []

    # ------------------------------------------------------------ what the device does

    def published(self, sender: Sender, topic: str, payload: bytes) -> None:
        index = parse(topic).chunk
        assert index is not None
        # An error here would end in the task of `Uploads`, and nobody would see it.
        if sender.told is None:
            self.broken.append(f"{sender.name} sends chunk {index} without a grant")
        elif index in sender.told:
            self.broken.append(f"{sender.name} sends chunk {index}, which is held")
        sender.on_the_way.add(index)
        if len(sender.on_the_way) > sender.window:
            self.broken.append(f"{sender.on_the_way} of {sender.name} are on the way")
        self.channels["chunks"].append((sender.name, (topic, payload)))

    def offers(self, sender: Sender) -> None:
        if sender.online and not sender.receipted:
            self.channels["up"].append((sender.name, sender.offer))

    def hears(self, sender: Sender, message: Grant | Have | str) -> None:
        """As the agent does: a message about another update than the one in the outbox is old."""
        update = sender.ref
        if isinstance(message, str):
            if message == update.sha256:
                sender.receipted = True
                sender.uploads.stop(message)
        elif message.sha256 == update.sha256 and not sender.receipted:
            held = ChunkSet.decode(message.held, update.chunk_count)
            if isinstance(message, Grant):
                sender.told, sender.window, sender.on_the_way = held, message.window, set()
                self._in_loop(lambda: sender.uploads.granted(message, update, sender.path))
            else:
                # One that comes late takes nothing back.
                sender.told = held | (sender.told or held)
                sender.on_the_way = {i for i in sender.on_the_way if i not in held}
                self._in_loop(lambda: sender.uploads.acknowledged(message))
        self.loop.run_all()

    def _in_loop(self, act: Callable[[], None]) -> None:
        async def acts() -> None:
            act()

        self.loop.finish(acts())

    # ------------------------------------------------------------ what the desk does

    def desk_says(self, replies: Any) -> None:
        for device, message in replies:
            verified = self.writes.of(self._named(device).ref)
            if message.sha256 == self._named(device).ref.sha256:
                held = ChunkSet.decode(message.held, self._named(device).ref.chunk_count)
                assert {i for i in range(held.chunk_count) if i in held} == verified, (
                    "the desk asks for a chunk that was verified, or claims one that was not"
                )
            self.channels["down"].append((device, message))

    def desk_hears(self, device: str, offer: Offer) -> None:
        if (offer.round, device) in self.recorded:
            # The store has decided: the receipt again, and a refusal for another update.
            self.channels["down"].append((device, offer.update.sha256))
            return
        before = self.desk._uploads.get(device)
        replies = self.desk.offered(device, offer, self.clock.now_s)
        if before is not None and self.desk._uploads[device] is not before:
            # Another update took its place: what had arrived of the first one is gone.
            self.writes.of(before.offer.update).clear()
        self.desk_says(replies)
        whole = self.desk.arrived(device)
        if whole is not None:
            self._handed_over(whole)

    def desk_gets(self, device: str, topic: str, payload: bytes) -> None:
        address = parse(topic)
        try:
            replies, whole = self.desk.received(
                device, address.sha256 or "", address.chunk or 0, payload, self.clock.now_s
            )
        except (PeerError, StoreUnavailable):
            return
        self.desk_says(replies)
        if whole is not None:
            self._handed_over(whole)

    def _handed_over(self, upload: Upload) -> None:
        assert upload.complete
        assert all(upload is not each for each in self.handed_over), "handed over twice"
        self.handed_over.append(upload)
        self.complete.append(upload)

    def _named(self, device: str) -> Sender:
        return next(sender for sender in self.senders if sender.name == device)

    # ------------------------------------------------------------ the channels

    # Rules are drawn alike, so what should happen often is a rule and what should be rare is one of
    # several things that a rule may do.

    @rule(channel=CHANNELS, count=st.integers(1, 12))
    def letters_arrive(self, channel: str, count: int) -> None:
        letters = self.channels[channel]
        arriving, self.channels[channel] = letters[:count], letters[count:]
        for device, letter in arriving:
            self._arrives(channel, device, letter)

    @rule()
    def everything_under_way_arrives(self) -> None:
        for channel in ("up", "down", "chunks"):
            self.letters_arrive(channel, len(self.channels[channel]))

    @rule(
        channel=CHANNELS,
        place=st.integers(0, 30),
        fate=st.sampled_from(["overtakes", "is lost", "is repeated", "is damaged"]),
    )
    def one_letter(self, channel: str, place: int, fate: str) -> None:
        letters = self.channels[channel]
        if not letters:
            return
        device, letter = letters[place % len(letters)]
        if fate != "is repeated":
            del letters[place % len(letters)]
        if fate == "is damaged":
            if channel != "chunks":
                return
            topic, payload = letter
            letter = (topic, bytes([payload[0] ^ 1]) + payload[1:])
        if fate != "is lost":
            self._arrives(channel, device, letter)

    def _arrives(self, channel: str, device: str, letter: Any) -> None:
        sender = self._named(device)
        if channel == "up":
            self.desk_hears(device, letter)
        elif channel == "chunks":
            self.desk_gets(device, *letter)
        elif sender.online:
            self.hears(sender, letter)
        else:
            self.channels["down"].append((device, letter))

    # ------------------------------------------------------------ the two sides

    @rule(who=st.none() | PLACES)
    def devices_offer(self, who: int | None) -> None:
        for sender in self.senders if who is None else [self._at(who)]:
            self.offers(sender)

    @rule(place=PLACES, what=st.sampled_from(["goes", "comes", "is slow", "is quick again"]))
    def the_network_of_a_device(self, place: int, what: str) -> None:
        sender = self._at(place)
        came = what == "comes" and not sender.online
        sender.online = sender.online if what.startswith("is") else what == "comes"
        sender.slow = sender.slow if what in ("goes", "comes") else what == "is slow"
        self.the_broker_acknowledges(place)
        if came:
            self.offers(sender)

    @rule(place=PLACES)
    def the_broker_acknowledges(self, place: int) -> None:
        sender = self._at(place)
        if sender.online:
            waiting, sender.waiting = sender.waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)
            self.loop.run_all()

    @rule(place=PLACES, what=st.sampled_from(["device", "desk", "broker", "update"]))
    def something_breaks(self, place: int, what: str) -> None:
        """A process is killed and starts again; or a device loses its update and makes another."""
        sender = self._at(place)
        if what == "desk":
            self._start_desk()
        elif what == "broker":
            for letters in self.channels.values():
                letters.clear()
        elif what == "device" or not sender.receipted:
            self.loop.finish(sender.uploads.close())
            if what == "update":
                self.made += 1
                sender.data = bytes_of(3, 100 + self.made)
                sender.path.write_bytes(sender.data)
            self._start(sender)
            self.offers(sender)

    def _at(self, place: int) -> Sender:
        return self.senders[place % len(self.senders)]

    @rule(seconds=st.sampled_from([1.0, SILENCE_S, 40.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.loop.run_all()
        due = self.desk.next_expiry()
        if due is not None and due <= self.clock.now_s:
            self.desk_says(self.desk.expired(self.clock.now_s))
            after = self.desk.next_expiry()
            assert after is None or after > self.clock.now_s, "the desk asks to be called for ever"

    @precondition(lambda self: self.complete)
    @rule(ends=st.sampled_from(["well", "well", "disk_full", "before_record", "after_record"]))
    def a_complete_upload_is_decided(self, ends: str) -> None:
        """As the conductor does: commit, record, receipt. `ends`: where it is cut off."""
        upload = self.complete.pop(0)
        device, offer = upload.device, upload.offer
        path = upload.part.commit()
        data = path.read_bytes()
        assert describe(data, CHUNK_BYTES) == offer.update, "other bytes than were sent"
        if ends == "before_record":
            self._start_desk()
            return
        if ends != "disk_full":
            self.recorded.setdefault((offer.round, device), data)
        if ends == "after_record":
            self._start_desk()
            return
        self.desk_says(self.desk.taken(upload, self.clock.now_s))
        if ends == "well":
            self.channels["down"].append((device, offer.update.sha256))

    # ------------------------------------------------------------ the claims

    @rule(refuses=st.booleans())
    def the_disk_of_the_desk(self, refuses: bool) -> None:
        self.writes.disk_refuses = refuses

    @invariant()
    def no_more_credit_is_granted_than_there_is(self) -> None:
        assert len(self.desk._sending) <= self.slots
        assert self.desk.on_their_way <= self.slots * self.window
        assert 1 <= self.desk.credit.total <= self.slots * self.window

    @invariant()
    def no_sender_oversteps_its_credit(self) -> None:
        assert not self.broken

    @invariant()
    def no_chunk_is_written_twice(self) -> None:
        assert not self.writes.broken

    def everything_arrives_once_the_faults_end(self) -> None:
        self.the_disk_of_the_desk(refuses=False)
        for place in range(len(self.senders)):
            self.the_network_of_a_device(place, "comes")
            self.the_network_of_a_device(place, "is quick again")
        chunks = sum(sender.ref.chunk_count for sender in self.senders)
        # A device that was cut off is heard again after a repeat of its offer, at the latest after
        # as many as there are devices, since each takes a slot in its turn.
        for _ in range(20 + 4 * len(self.senders) + chunks):
            if all(sender.receipted for sender in self.senders):
                return
            while any(self.channels.values()) or self.complete:
                self.everything_under_way_arrives()
                while self.complete:
                    self.a_complete_upload_is_decided("well")
            self.let_time_pass(OFFER_AGAIN_S)
            self.devices_offer(None)
        raise AssertionError("an upload does not arrive, though nothing is in its way")


TestUploads = UploadModel.TestCase
TestUploads.settings = search(examples=100, steps=40, deep_examples=4_000, deep_steps=60)
