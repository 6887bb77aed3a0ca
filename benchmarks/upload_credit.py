"""Many updates at once through one Mosquitto: with the coordinator's credit, and without it.

    python benchmarks/upload_credit.py                              40 devices, 5 MB each
    python benchmarks/upload_credit.py --devices 10 --megabytes 1   a quick look

Every device offers its update at the same moment. With credit, the real upload desk, links and
senders do what they do in a round, without training and averaging. Without credit, the same chunks
go over the same links as fast as the broker acknowledges them, to a receiver that verifies and
writes each like the desk. Both go through a Mosquitto with default limits, and then through one
whose queue holds 100 messages, with 10 in flight. What was lost is what never arrived; beside it
stands what the broker itself counted as dropped. The desk and the devices are processes of their
own, so that neither waits for the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from processes import mosquitto, print_table, program, wait_for_event
from round_overhead import counters

from fedge.coordinator.uploads import Upload, UploadDesk
from fedge.edge_agent.upload import Uploads
from fedge.schemas import messages, topics
from fedge.schemas.blob_files import BlobDirectory, PartialBlob, read_chunk
from fedge.schemas.blobs import BlobRef, describe
from fedge.schemas.link.broker import BrokerSettings
from fedge.schemas.link.protocol import Delivery, Link, LinkUp
from fedge.schemas.messages import Grant, Have, LossCurve, Message, Offer, Receipt, ReceiptStatus
from fedge.schemas.topics import Channel, Topics

NAMES = Topics("bench")
OFFER_AGAIN_S = 30.0
QUIET_S = 3.0
"""Without credit nobody says when it is over: it is when nothing has come for so long."""
LIMIT_S = 900.0
SMALL_BROKER = ("max_queued_messages 100", "max_inflight_messages 10")


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def session(port: int, client_id: str, receive_maximum: int = 32) -> Link:
    return BrokerSettings(port=port).link(
        client_id, random.SystemRandom(), receive_maximum=receive_maximum
    )


async def deliveries(link: Link) -> AsyncIterator[Delivery]:
    while True:
        event = await link.next_event()
        if isinstance(event, Delivery):
            yield event
            link.ack(event)


async def until_up(link: Link) -> None:
    while not isinstance(await link.next_event(), LinkUp):
        pass


# ------------------------------------------------------------------ the coordinator's side


class Receiver:
    """What both kinds of receiver do: two sessions, offers, chunks, receipts."""

    def __init__(self, port: int, devices: int) -> None:
        # As in fedge.coordinator.serving.
        self.control = session(port, "bench.coordinator", 256)
        self.bulk = session(port, "bench.coordinator.bulk")
        self.devices = devices
        self.chunks = 0
        self.done = 0
        self.last_at = self.started_at = 0.0
        self.telling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self.control.subscribe(*NAMES.coordinator_control)
        await self.bulk.subscribe(*NAMES.coordinator_bulk)
        for link in (self.control, self.bulk):
            await link.start()
            await until_up(link)
        say("ready")

    def tell(self, device: str, message: Message) -> None:
        topic = NAMES.down(device, type(message))
        task = asyncio.create_task(self.control.publish(topic, messages.encode(message)))
        self.telling.add(task)
        task.add_done_callback(self.telling.discard)

    def noticed(self) -> None:
        self.last_at = time.perf_counter()
        self.started_at = self.started_at or self.last_at

    async def close(self) -> None:
        await self.control.close()
        await self.bulk.close()


class CreditReceiver(Receiver):
    """The real desk, driven as the service drives it."""

    def __init__(self, port: int, devices: int, folder: Path, slots: int, window: int) -> None:
        super().__init__(port, devices)
        self.desk = UploadDesk(folder, slots=slots, window=window)
        self.complete: asyncio.Queue[Upload] = asyncio.Queue()
        self.due = asyncio.Event()
        self.least_credit = self.desk.credit.total

    async def run(self) -> dict[str, Any]:
        await self.start()
        work = [
            asyncio.create_task(each)
            for each in (self.offers(), self.uploads(), self.finish(), self.keep_time())
        ]
        try:
            async with asyncio.timeout(LIMIT_S):
                while self.done < self.devices:
                    await asyncio.wait(work, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
                    for task in work:
                        if task.done():
                            await task
        finally:
            for task in work:
                task.cancel()
        if self.telling:
            await asyncio.wait(tuple(self.telling))
        await self.close()
        return {
            "complete": self.done,
            "arrived": self.chunks,
            "seconds": self.last_at - self.started_at,
            "least_credit": self.least_credit,
            "credit": self.desk.credit.total,
        }

    async def offers(self) -> None:
        async for delivery in deliveries(self.control):
            address = topics.parse(delivery.topic)
            if address.message is Offer and address.device is not None:
                self.noticed()
                offer = messages.decode(Offer, delivery.payload)
                self.answer(self.desk.offered(address.device, offer, time.monotonic()))

    async def uploads(self) -> None:
        async for delivery in deliveries(self.bulk):
            address = topics.parse(delivery.topic)
            if address.channel is not Channel.UP_BULK:
                continue
            assert address.device is not None
            assert address.sha256 is not None
            assert address.chunk is not None
            self.chunks += 1
            self.noticed()
            with contextlib.suppress(messages.PeerError):
                replies, complete = self.desk.received(
                    address.device, address.sha256, address.chunk, delivery.payload,
                    time.monotonic(),
                )  # fmt: skip
                self.answer(replies)
                if complete is not None:
                    self.complete.put_nowait(complete)

    async def finish(self) -> None:
        while True:
            upload = await self.complete.get()
            await asyncio.to_thread(upload.part.commit)
            self.done += 1
            self.noticed()
            update = upload.offer.update
            self.tell(
                upload.device,
                Receipt(round=1, sha256=update.sha256, status=ReceiptStatus.ACCEPTED),
            )
            self.answer(self.desk.taken(upload, time.monotonic()))

    async def keep_time(self) -> None:
        while True:
            wake = self.desk.next_expiry()
            delay_s = None if wake is None else max(0.0, wake - time.monotonic())
            try:
                async with asyncio.timeout(delay_s):
                    await self.due.wait()
            except TimeoutError:
                self.answer(self.desk.expired(time.monotonic()))
            self.due.clear()

    def answer(self, replies: Iterable[tuple[str, Grant | Have]]) -> None:
        for device, message in replies:
            self.tell(device, message)
        self.least_credit = min(self.least_credit, self.desk.credit.total)
        self.due.set()


class PlainReceiver(Receiver):
    """Verifies and writes every chunk that comes, and gives no credit."""

    def __init__(self, port: int, devices: int, folder: Path) -> None:
        super().__init__(port, devices)
        self.folder = folder
        self.parts: dict[str, PartialBlob] = {}

    async def run(self) -> dict[str, Any]:
        await self.start()
        work = [asyncio.create_task(self.offers()), asyncio.create_task(self.uploads())]
        while self.done < self.devices:
            before = self.chunks
            # Between the last offer and the first chunk nothing comes either, for less than that.
            await asyncio.wait(work, timeout=QUIET_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in work:
                if task.done():
                    await task
            if before and before == self.chunks:
                break
        for task in work:
            task.cancel()
        await self.close()
        held = sum(len(part.receiver.held) for part in self.parts.values())
        return {
            "complete": self.done,
            "arrived": self.chunks,
            "held": held,
            "seconds": self.last_at - self.started_at,
        }

    async def offers(self) -> None:
        async for delivery in deliveries(self.control):
            address = topics.parse(delivery.topic)
            if address.message is Offer and address.device is not None:
                offer = messages.decode(Offer, delivery.payload)
                directory = BlobDirectory(self.folder / address.device)
                self.parts[address.device] = directory.open_partial(offer.update)
                if len(self.parts) == self.devices:
                    for device, part in self.parts.items():
                        held = part.receiver.held.encode()
                        self.tell(
                            device, Grant(round=1, sha256=part.ref.sha256, window=1000, held=held)
                        )

    async def uploads(self) -> None:
        async for delivery in deliveries(self.bulk):
            address = topics.parse(delivery.topic)
            assert address.device is not None
            assert address.chunk is not None
            self.chunks += 1
            self.noticed()
            part = self.parts[address.device]
            if part.receiver.receive(address.chunk, delivery.payload) and part.receiver.complete:
                await asyncio.to_thread(part.commit)
                self.done += 1
                self.noticed()


# ------------------------------------------------------------------ the devices' side


class Counted:
    """A link that counts what is published over it and what was acknowledged."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.sent = self.acknowledged = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def publish(self, topic: str, payload: bytes, **options: Any) -> None:
        self.sent += 1
        await self._link.publish(topic, payload, **options)
        self.acknowledged += 1


class Device:
    def __init__(self, port: int, name: str, ref: BlobRef, path: Path) -> None:
        self.name = name
        self.ref = ref
        self.path = path
        self.control = session(port, f"bench.device.{name}.control")
        self.bulk = Counted(session(port, f"bench.device.{name}.bulk"))

    async def start(self) -> None:
        await self.control.subscribe(*NAMES.device_control(self.name))
        for link in (self.control, self.bulk):
            await link.start()
            await until_up(link)  # type: ignore[arg-type]

    async def offer(self) -> None:
        offer = Offer(
            round=1, base=0, update=self.ref, examples=1, steps=1, training_s=0.0,
            loss=LossCurve(), metrics={},
        )  # fmt: skip
        await self.control.publish(NAMES.up(self.name, Offer), messages.encode(offer))

    async def with_credit(self) -> None:
        """Until the receipt."""
        uploads = Uploads(self.bulk, NAMES, self.name)  # type: ignore[arg-type]
        again = asyncio.create_task(self.keep_offering())
        reading = asyncio.create_task(self.read_nothing())
        async for delivery in deliveries(self.control):
            kind = topics.parse(delivery.topic).message
            if kind is Grant:
                uploads.granted(messages.decode(Grant, delivery.payload), self.ref, self.path)
            elif kind is Have:
                uploads.acknowledged(messages.decode(Have, delivery.payload))
            elif kind is Receipt:
                break
        again.cancel()
        reading.cancel()
        await uploads.close()

    async def without_credit(self) -> None:
        """All chunks at once, when all devices are ready: as many on their way as the link lets."""
        await self.offer()
        async for delivery in deliveries(self.control):
            if topics.parse(delivery.topic).message is Grant:
                break

        async def send(index: int) -> None:
            topic = NAMES.upload_chunk(self.name, self.ref.sha256, index)
            await self.bulk.publish(topic, read_chunk(self.path, self.ref, index))

        await asyncio.gather(*(send(index) for index in range(self.ref.chunk_count)))

    async def keep_offering(self) -> None:
        while True:
            await self.offer()
            await asyncio.sleep(OFFER_AGAIN_S)

    async def read_nothing(self) -> None:
        while True:
            await self.bulk.next_event()

    async def close(self) -> None:
        await self.control.close()
        await self.bulk.close()


async def play_devices(port: int, count: int, path: Path, *, credit: bool) -> dict[str, Any]:
    ref = await asyncio.to_thread(lambda: describe(path.read_bytes()))
    devices = [Device(port, f"d{number:03d}", ref, path) for number in range(count)]
    for device in devices:
        await device.start()
    if credit:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(device.with_credit() for device in devices))
    else:
        await asyncio.gather(*(device.without_credit() for device in devices))
    result = {
        "needed": ref.chunk_count * count,
        "sent": sum(device.bulk.sent for device in devices),
        "acknowledged": sum(device.bulk.acknowledged for device in devices),
    }
    for device in devices:
        await device.close()
    return result


# ------------------------------------------------------------------ one run after the other


async def one_run(
    folder: Path, options: argparse.Namespace, *, credit: bool, broker: tuple[str, ...]
) -> dict[str, Any]:
    common = [f"--devices={options.devices}", f"--slots={options.slots}"]
    common += [f"--window={options.window}", "--credit" if credit else "--no-credit"]
    with mosquitto(folder, *broker) as (port, _), contextlib.ExitStack() as stack:
        async with counters(port) as values:

            def start(role: str) -> Any:
                arguments = [str(Path(__file__).resolve()), f"--role={role}", f"--port={port}"]
                return stack.enter_context(program(role, [*arguments, *common], folder))

            receiver = start("receiver")
            await asyncio.to_thread(wait_for_event, receiver, "ready")
            devices = start("devices")
            sent = await asyncio.to_thread(wait_for_event, devices, "done", limit_s=LIMIT_S)
            received = await asyncio.to_thread(wait_for_event, receiver, "done", limit_s=LIMIT_S)
            await asyncio.sleep(2.5)  # the broker's counters come once a second
            dropped = int(values.get("publish/messages/dropped", 0))
    del sent["event"], received["event"]
    held = received.pop("held", sent["needed"])
    return {
        "credit": credit,
        "broker": " ".join(broker) or "default",
        **sent,
        **{key: value for key, value in received.items() if key != "credit"},
        "credit_at_the_end": received.get("credit"),
        "missing": sent["needed"] - held,
        "broker_dropped": dropped,
        "megabytes_per_s": options.devices * options.megabytes / max(received["seconds"], 1e-9),
    }


def print_runs(runs: list[dict[str, Any]], devices: int) -> None:
    names = ("complete", "needed", "sent", "acknowledged", "arrived", "missing", "broker_dropped")
    for run in runs:
        title = "with credit" if run["credit"] else "without credit"
        print(f"\n{title}, broker: {run['broker']}")
        remarks = {
            "complete": f"of {devices} updates",
            "needed": "chunks that the updates have",
            "sent": "chunks, with those that were sent again",
            "acknowledged": "chunks, by the broker",
            "arrived": "chunks, with those that came twice",
            "missing": "chunks that never arrived",
            "broker_dropped": "messages, in the broker's own count",
        }
        rows = [(name, f"{run[name]:,}", remarks[name]) for name in names]
        rows.append(("seconds", f"{run['seconds']:.1f}", f"{run['megabytes_per_s']:.0f} MB/s"))
        if run["credit"]:
            end = f"chunks at the least, {run['credit_at_the_end']} at the end"
            rows.append(("credit", str(run["least_credit"]), end))
        print_table(rows)
    print("\n" + json.dumps(runs))


async def play(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path.cwd()
    if options.role == "devices":
        path = folder / "update"
        return await play_devices(options.port, options.devices, path, credit=options.credit)
    if options.credit:
        slots, window = options.slots, options.window
        return await CreditReceiver(
            options.port, options.devices, folder / "uploads", slots, window
        ).run()
    return await PlainReceiver(options.port, options.devices, folder / "uploads").run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--devices", type=int, default=40)
    parser.add_argument("--megabytes", type=float, default=5.0, help="of each update")
    parser.add_argument("--slots", type=int, default=16, help="as uploads.slots")
    parser.add_argument("--window", type=int, default=32, help="as uploads.window")
    parser.add_argument("--role", choices=("receiver", "devices"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--credit", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        say("done", **asyncio.run(play(options)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (broker, credit) in enumerate(
            [((), True), ((), False), (SMALL_BROKER, True), (SMALL_BROKER, False)]
        ):
            place = Path(folder) / str(number)
            place.mkdir()
            update = random.Random(1).randbytes(int(options.megabytes * 1e6))
            (place / "update").write_bytes(update)
            runs.append(asyncio.run(one_run(place, options, credit=credit, broker=broker)))
    print_runs(runs, options.devices)
    lossless = [run for run in runs if run["credit"]]
    if any(run["complete"] != options.devices for run in lossless) or runs[0]["broker_dropped"]:
        sys.exit("not everything arrived, or the default broker dropped something")


if __name__ == "__main__":
    main()
