"""The outbox: updates that have no receipt yet, each a file and a row that names it.

A file is written first, its row second; the row goes first, its file second. So whatever the moment
of a power cut, a row without a file is a file that was lost, and a file without a row is rubbish.
Knows nothing of offers on the network, and nothing of what a receipt says.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from fedge.edge_agent.durable import disk
from fedge.edge_agent.state import AgentState
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Offer, ReceiptStatus

log = EventLog(__name__)

_UPDATE = re.compile(r"([0-9]{1,18})\.safetensors")
_READ_BYTES = 1024 * 1024


class Outbox:
    """The outbox in `folder`, which is made if it is not there; its rows are in `memory`.

    Raises `StoreUnavailable` for a disk that cannot be used now, here and in each method that says
    so.
    """

    def __init__(self, memory: AgentState, folder: Path, device: str) -> None:
        self._memory = memory
        self._folder = folder
        self._device = device
        with disk(f"make {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        rows = memory.outbox()
        self._offers = {number: offer for number, offer in rows.items() if offer is not None}
        self._unreadable = rows.keys() - self._offers.keys()
        self._generations = memory.outbox_generations()

    def __contains__(self, number: object) -> bool:
        return number in self._offers

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._offers))

    @property
    def rounds(self) -> frozenset[int]:
        """The rounds whose update has no receipt, readable or not."""
        return frozenset(self._offers) | self._unreadable

    def offer(self, number: int) -> Offer | None:
        """The offer of a round, None if there is none."""
        return self._offers.get(number)

    def generation(self, number: int) -> int | None:
        """Of the example store that the update was trained on; None if it was none."""
        return self._generations.get(number)

    def path(self, number: int) -> Path:
        """Where the update of a round is, or is to be written."""
        return self._folder / f"{number}.safetensors"

    def is_cut_short(self, number: int) -> bool:
        """Whether the update's file is gone or has another size; costs nothing to ask."""
        offer = self._offers.get(number)
        try:
            return offer is None or self.path(number).stat().st_size != offer.update.size_bytes
        except OSError:
            return True

    def damage(self, number: int) -> str | None:
        """What is wrong with the update of a round, None if it is what was offered.

        Reads the whole file: megabytes, so not on the event loop. Raises `StoreUnavailable`.
        """
        offer = self._offers.get(number)
        if offer is None:
            return "its offer cannot be read; it was written by another release"
        path = self.path(number)
        hasher = hashlib.sha256()
        with disk(f"read {path}"):
            try:
                with path.open("rb") as file:
                    while data := file.read(_READ_BYTES):
                        hasher.update(data)
            except FileNotFoundError:
                return "its file is gone"
        if hasher.hexdigest() != offer.update.sha256:
            return "its file is damaged: it has another digest than when it was written"
        return None

    def keep(self, offer: Offer, generation: int | None = None) -> None:
        """Keeps the update that was written to `path`, durably. Raises `StoreUnavailable`.

        `generation`: of the example store that it was trained on, if it was one.
        """
        self._memory.put_in_outbox(offer, generation)
        self._offers[offer.round] = offer
        if generation is not None:
            self._generations[offer.round] = generation

    def settle(self, number: int, status: ReceiptStatus, reason: str | None) -> None:
        """Writes down the receipt, durably; `forget` may follow. Raises `StoreUnavailable`."""
        self._memory.settle(number, status, reason)
        self._offers.pop(number, None)
        self._generations.pop(number, None)

    def lose(self, number: int, reason: str) -> None:
        """Writes down that an update was lost, durably. Raises `StoreUnavailable`."""
        self._memory.lose(number, reason)
        self._offers.pop(number, None)
        self._generations.pop(number, None)
        self._unreadable -= {number}

    def forget(self, number: int) -> None:
        """Removes the file of a round. What cannot be removed now is at the next start."""
        with contextlib.suppress(OSError):
            self.path(number).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes the files that no row names: trainings that a crash cut off from the rest.

        For the start, before anybody trains. Raises `StoreUnavailable`.
        """
        with disk(f"sweep {self._folder}"):
            for path in self._folder.iterdir():
                update = _UPDATE.fullmatch(path.name)
                if update is None or int(update[1]) not in self.rounds:
                    log.info("outbox_file_removed", device=self._device, file=path.name)
                    path.unlink(missing_ok=True)
