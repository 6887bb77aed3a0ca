"""A simple network for uploads: devices that send in order, and a queue that drops what overflows.

Independent of the desk's own bookkeeping: it counts what is sent, dropped and repeated by what
passes through it. Time goes in ticks. In each, every device sends a few chunks if its credit allows
and the coordinator takes a few from the queue; control messages take some ticks and get lost never
or, where a test asks for it, sometimes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fedge.coordinator.uploads import Reply, Upload, UploadDesk
from fedge.schemas.blobs import BlobSender, ChunkSet, chunks_of, describe
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.messages import Grant, Have, LossCurve, Offer

CHUNK = 1024
TICK_S = 0.05
OFFER_AGAIN_S = 30.0


def data_of(name: str, chunks: int) -> bytes:
    return Random(name).randbytes(chunks * CHUNK - 100)


def offer_of(data: bytes, round_number: int = 1) -> Offer:
    return Offer(
        round=round_number,
        base=0,
        update=describe(data, CHUNK),
        examples=1,
        steps=1,
        training_s=0.0,
        loss=LossCurve(),
        metrics={},
    )


@dataclass
class Device:
    """Sends as an agent does: one chunk after the other, the lowest first, until each is gone."""

    name: str
    data: bytes
    chunks_per_tick: float = 2.0
    away: tuple[float, float] = (0.0, 0.0)
    """From when to when it neither sends nor reads, in seconds."""
    offered_at: float = float("-inf")
    owed: float = 0.0

    def __post_init__(self) -> None:
        parts = [bytes(chunk) for chunk in chunks_of(self.data, CHUNK)]
        self.offer = offer_of(self.data)
        self.sender = BlobSender(self.offer.update, parts.__getitem__)
        self.sending: Iterator[tuple[int, bytes]] = iter(())
        self.in_hand: tuple[int, bytes] | None = None
        self.unread: list[Grant | Have] = []

    def hears(self, message: Grant | Have) -> None:
        held = ChunkSet.decode(message.held, self.sender.ref.chunk_count)
        if isinstance(message, Grant):
            self.sender.granted(message.window, held)
        else:
            self.sender.acknowledged(held)

    def sends(self) -> Iterator[tuple[int, bytes]]:
        """What goes out in this tick. The chunk in hand is on its way and cannot be called back."""
        self.owed = min(self.owed + self.chunks_per_tick, max(1.0, self.chunks_per_tick))
        while self._next() is not None and self.owed >= 1:
            self.owed -= 1
            gone, self.in_hand = self.in_hand, None
            if gone is not None:
                yield gone

    def _next(self) -> tuple[int, bytes] | None:
        if self.in_hand is None:
            self.in_hand = next(self.sending, None)
        if self.in_hand is None:
            self.sending = self.sender.take()
            self.in_hand = next(self.sending, None)
        return self.in_hand


@dataclass
class LossyNetwork:
    """`room`: chunks that the queue holds. `rate`: chunks that the coordinator takes in a tick.

    `latency`: ticks that a control message takes. `control_loss`: the share of them that is lost.
    """

    desk: UploadDesk
    devices: list[Device]
    rng: Random
    room: int
    rate: int = 8
    latency: int = 1
    control_loss: float = 0.0
    disk_full: tuple[float, float] = (0.0, 0.0)
    now: float = 0.0
    arrived: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    dropped: int = 0
    most_on_their_way: int = 0
    totals: list[int] = field(default_factory=list)
    repeats: Counter[str] = field(default_factory=Counter)
    fresh_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_name = {device.name: device for device in self.devices}
        self._queue: deque[tuple[str, int, bytes]] = deque()
        self._control: deque[tuple[int, str, Grant | Have]] = deque()
        self._tick = 0
        self._deciding: deque[Upload] = deque()

    @property
    def needed(self) -> int:
        """Chunks that must arrive once."""
        return sum(device.sender.ref.chunk_count for device in self.devices)

    @property
    def complete(self) -> bool:
        return self.arrived == {device.name: device.data for device in self.devices}

    def run(self, limit_s: float) -> float:
        """Until every update is there; returns the seconds it took, `limit_s` if it never was."""
        while self.now < limit_s and not self.complete:
            self.step()
        return self.now

    def step(self) -> None:
        self._tick += 1
        self.now = self._tick * TICK_S
        self._deliver_control()
        for device in self.rng.sample(self.devices, len(self.devices)):
            if device.away[0] <= self.now < device.away[1] or device.name in self.arrived:
                continue
            while device.unread:
                device.hears(device.unread.pop(0))
            if self.now - device.offered_at >= OFFER_AGAIN_S:
                device.offered_at = self.now
                self._hear(self.desk.offered(device.name, device.offer, self.now))
            for index, payload in device.sends():
                self.sent += 1
                if len(self._queue) < self.room:
                    self._queue.append((device.name, index, payload))
                else:
                    self.dropped += 1
        while self._deciding:
            upload = self._deciding.popleft()
            self.arrived[upload.device] = upload.part.commit().read_bytes()
            self._hear(self.desk.taken(upload, self.now))
        for _ in range(min(self.rate, len(self._queue))):
            self._receive(*self._queue.popleft())
        due = self.desk.next_expiry()
        if due is not None and due <= self.now:
            self._hear(self.desk.expired(self.now))
            later = self.desk.next_expiry()
            # Whoever waits for it must not be woken for ever.
            assert later is None or later > self.now
        self.most_on_their_way = max(self.most_on_their_way, self.desk.on_their_way)
        self.totals.append(self.desk.credit.total)

    def _receive(self, name: str, index: int, payload: bytes) -> None:
        device = self._by_name[name]
        if name in self.arrived:
            self.repeats[name] += 1
            return
        upload = self.desk._uploads[name]
        if upload.file is not None and index in upload.file.receiver.held:
            self.repeats[name] += 1
        else:
            self.fresh_at.append(self.now)
        try:
            replies, finished = self.desk.received(
                name, device.sender.ref.sha256, index, payload, self.now
            )
        except StoreUnavailable:
            return
        self._hear(replies)
        if finished is not None:
            self._deciding.append(finished)

    def _hear(self, replies: Iterable[Reply]) -> None:
        for name, message in replies:
            if self.rng.random() >= self.control_loss:
                self._control.append((self._tick + self.latency, name, message))

    def _deliver_control(self) -> None:
        while self._control and self._control[0][0] <= self._tick:
            _, name, message = self._control.popleft()
            # Whoever is away reads it afterwards: the broker keeps it.
            self._by_name[name].unread.append(message)


def network(
    folder: Path,
    chunks: list[int],
    *,
    room: int,
    slots: int = 16,
    window: int = 32,
    silence_s: float = 15.0,
    seed: int = 1,
    chunks_per_tick: float = 2.0,
    **more: object,
) -> LossyNetwork:
    """Devices with so many chunks each, and a desk of these slots and windows."""
    desk = UploadDesk(folder, slots=slots, window=window, silence_s=silence_s)
    devices = [
        Device(f"d{number:02d}", data_of(f"{seed}/{number}", count), chunks_per_tick)
        for number, count in enumerate(chunks)
    ]
    return LossyNetwork(desk, devices, Random(seed), room, **more)  # type: ignore[arg-type]
