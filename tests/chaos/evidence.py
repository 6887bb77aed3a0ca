"""What was said and made, written down on the way: updates, offers, receipts, announcements.

An update is copied before any byte of its device passes the proxy after it was made, so no receipt
can come, and no file can be removed, before the copy is there. Receipts are noted as the
coordinator says them, delivered or not: what it said, it must keep. Judges nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.mqtt_wire import Publish
from tests.chaos.tampering import Side

_PLACE = re.compile(
    r"fedge/1/[^/]+/(?P<channel>all|dn|up|upb|blob|state)/(?P<first>[^/]+)(?P<rest>.*)"
)
_REPLAYABLE = ("offer", "checkin", "chunk", "presence", "report")
MOMENTS = (
    "assignment", "checkin", "chunk", "grant", "have", "offer", "receipt", "round", "version",
)  # fmt: skip
"""Kinds of messages that a fault may wait for."""


def kind_of(topic: str) -> tuple[str, str | None]:
    """What a message is, as one word, and the device that its topic names."""
    found = _PLACE.fullmatch(topic)
    if found is None:
        return "foreign", None
    first, rest = found["first"], found["rest"].lstrip("/")
    match found["channel"]:
        case "all":
            return first, None
        case "blob":
            return "blob", None
        case "upb":
            return "chunk", first
        case "state":
            return "presence", first
        case _:
            return rest, first


@dataclass(frozen=True, slots=True)
class SaidReceipt:
    """A receipt that the coordinator sent."""

    device: str
    round: int
    sha256: str
    status: str
    at_s: float


@dataclass(frozen=True, slots=True)
class SaidOffer:
    """An offer that a device sent."""

    device: str
    round: int
    base: int
    sha256: str
    examples: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A device asked the coordinator for something: chunks of a blob, or an answer to an offer."""

    device: str
    what: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Announced:
    """A version announcement: said by the coordinator, or heard by the observer.

    `retained`: of one that was heard, whether it came from the broker's memory.
    """

    version: int
    retained: bool
    at_s: float


class Evidence:
    """Everything noted in one run. `outboxes`: by device, where its updates lie."""

    def __init__(self, outboxes: dict[str, Path]) -> None:
        self._outboxes = outboxes
        self._looked: dict[Path, tuple[int, int]] = {}
        self.updates: dict[str, bytes] = {}
        self.made: dict[tuple[str, int], list[str]] = {}
        self.receipts: list[SaidReceipt] = []
        self.offers: dict[tuple[str, int, str], SaidOffer] = {}
        self.asked: list[Asked] = []
        self.answered_s: dict[str, list[float]] = {}
        self.announced: list[Announced] = []
        self.said_versions: list[Announced] = []
        self.recorded: dict[str, deque[tuple[str, bytes]]] = {
            kind: deque(maxlen=200) for kind in _REPLAYABLE
        }
        self.counted: dict[str, int] = {}
        self._waiting: list[tuple[str, str, Callable[[], None]]] = []

    # ------------------------------------------------------------ updates

    def look_into_outbox(self, device: str) -> None:
        """Copies every update that lies in the device's outbox and was not copied before."""
        with contextlib.suppress(OSError):
            for path in self._outboxes[device].glob("*.safetensors"):
                found = path.stat()
                mark = (found.st_ino, found.st_mtime_ns)
                if self._looked.get(path) != mark:
                    data = path.read_bytes()
                    self._looked[path] = mark
                    self.keep_update(device, int(path.stem), data)

    def keep_update(self, device: str, round_number: int, data: bytes) -> str:
        """Keeps an update; returns its digest."""
        digest = hashlib.sha256(data).hexdigest()
        self.updates[digest] = data
        made = self.made.setdefault((device, round_number), [])
        if digest not in made:
            made.append(digest)
        return digest

    def note_offer(self, device: str, payload: bytes) -> None:
        """Keeps what an offer says."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(payload)
            offer = SaidOffer(
                device, said["round"], said["base"], said["update"]["sha256"], said["examples"]
            )
            self.offers[device, offer.round, offer.sha256] = offer

    def _note_question(self, device: str, kind: str, payload: bytes) -> None:
        said = json.loads(payload)
        what = said["sha256"] if kind == "need" else f"round {said['round']}"
        self.asked.append(Asked(device, f"{kind} of {what}", time.monotonic()))

    # ------------------------------------------------------------ the wire

    def of_device(self, device: str) -> Callable[[Side, Publish], None]:
        """The tap for a device's proxy."""

        def tap(side: Side, message: Publish) -> None:
            kind, _ = kind_of(message.topic)
            self._happened(kind, device)
            if side is Side.UP:
                if kind in self.recorded:
                    self.recorded[kind].append((message.topic, message.payload))
                if kind == "offer":
                    self.note_offer(device, message.payload)
                if kind in ("need", "offer"):
                    self._note_question(device, kind, message.payload)

        return tap

    def of_coordinator(self, name: str) -> Callable[[Side, Publish], None]:
        """The tap for the coordinator's proxy."""

        def tap(side: Side, message: Publish) -> None:
            kind, device = kind_of(message.topic)
            self._happened(kind, name)
            if side is Side.UP and kind in ("grant", "receipt") and device is not None:
                self.answered_s.setdefault(device, []).append(time.monotonic())
            if side is Side.UP and kind == "receipt" and device is not None:
                said = json.loads(message.payload)
                self.receipts.append(
                    SaidReceipt(
                        device, said["round"], said["sha256"], said["status"], time.monotonic()
                    )
                )
            if side is Side.UP and kind == "version":
                self.said_versions.append(_announced(message))

        return tap

    def of_observer(self, message: Publish) -> None:
        """What the observer heard."""
        kind, _ = kind_of(message.topic)
        if kind == "version" and message.payload:
            self.announced.append(_announced(message))

    # ------------------------------------------------------------ moments

    def when(self, kind: str, program: str, act: Callable[[], None]) -> Callable[[], None]:
        """Calls `act` as the next message of `kind` passes the program's proxy, before it is out.

        Returns what takes the wish back.
        """
        wish = (kind, program, act)
        self._waiting.append(wish)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(wish)

        return forget

    def _happened(self, kind: str, program: str) -> None:
        self.counted[kind] = self.counted.get(kind, 0) + 1
        for wish in [each for each in self._waiting if each[:2] == (kind, program)]:
            self._waiting.remove(wish)
            wish[2]()


def _announced(message: Publish) -> Announced:
    number = json.loads(message.payload)["number"]
    return Announced(number, message.retained, time.monotonic())
