"""The upload desk: who may send an update now, and how much of it is here.

Credit keeps the broker's queues short: at most `slots` devices send at a time, each at most
`window` chunks ahead of what was verified here, and `slots * window` stays under the queue limit
of a broker with default settings (1,000 messages in mosquitto); beyond it, brokers drop what they
have acknowledged. Others wait their turn in order. A device that stops sending loses its slot, not
its chunks. The desk decides and writes verified chunks; it knows no topic and no round.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.schemas.blob_files import BlobDirectory, PartialBlob
from fedge.schemas.errors import PeerError, RejectReason
from fedge.schemas.messages import Grant, Have, Offer

SAFE_QUEUE_MESSAGES = 1000


@dataclass(slots=True)
class Upload:
    """One update on its way. `silent_since`: when its last chunk (or its grant) was seen."""

    device: str
    offer: Offer
    part: PartialBlob
    granted: bool = False
    since_have: int = 0
    silent_since: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every chunk is here and verified."""
        return self.part.receiver.complete


Reply = tuple[str, Grant | Have]
"""A device and what to tell it."""


class UploadDesk:
    """Uploads by device: one each. Files lie in `folder`, in a folder a round and a device.

    `slots`, `window`: as above; their product must stay below 1,000. `silence_s`: a granted device
    that sends nothing for so long gives its slot to the next in line.
    """

    def __init__(self, folder: Path, *, slots: int, window: int, silence_s: float = 15.0) -> None:
        if slots * window >= SAFE_QUEUE_MESSAGES:
            raise ValueError(f"{slots} slots of {window} chunks overrun a broker's queue of 1,000")
        self.folder = folder
        self._slots = slots
        self._window = window
        self._silence_s = silence_s
        self._uploads: OrderedDict[str, Upload] = OrderedDict()

    def __len__(self) -> int:
        return len(self._uploads)

    def directory(self, round_number: int, device: str) -> BlobDirectory:
        """Where a device's update of a round lies: two devices may send the same bytes."""
        return BlobDirectory(self.folder / str(round_number) / device)

    def offered(self, device: str, offer: Offer, now: float) -> Sequence[Reply]:
        """Takes a device into the line; repeats are answered from where it stands.

        Another update of the same device replaces the first, whose chunks are discarded.
        """
        upload = self._uploads.get(device)
        if upload is not None and upload.offer.update.sha256 != offer.update.sha256:
            if upload.complete:
                # It is being decided; the device offers again when it has no receipt for this one.
                return ()
            self.drop(device)
            upload = None
        if upload is None:
            part = self.directory(offer.round, device).open_partial(offer.update)
            upload = self._uploads[device] = Upload(device, offer, part, silent_since=now)
        if upload.granted:
            return (self._grant(upload, now),)
        return self._fill_slots(now)

    def received(
        self, device: str, sha256: str, index: int, payload: bytes, now: float
    ) -> tuple[Sequence[Reply], Upload | None]:
        """Verifies and writes a chunk. Returns what to tell, and the upload if it is complete now.

        A complete upload keeps its slot until `taken`. Raises `PeerError`: not_needed for a chunk
        of nothing that was offered, else as `BlobRef.check_chunk`.
        """
        upload = self._uploads.get(device)
        if upload is None or upload.offer.update.sha256 != sha256:
            raise PeerError(RejectReason.NOT_NEEDED, f"a chunk of no open upload: {sha256[:12]}")
        fresh = upload.part.receiver.receive(index, payload)
        upload.silent_since = now
        if not fresh:
            return (), None
        if upload.complete:
            return (), upload
        upload.since_have += 1
        # Half a window, so that the sender never waits for the answer to its last chunk.
        if upload.granted and upload.since_have >= max(1, self._window // 2):
            upload.since_have = 0
            return ((device, self._have(upload)),), None
        return (), None

    def taken(self, upload: Upload, now: float) -> Sequence[Reply]:
        """Ends an upload that was decided; its slot goes to the next in line."""
        if self._uploads.get(upload.device) is upload:
            del self._uploads[upload.device]
        upload.part.close()
        return self._fill_slots(now)

    def drop(self, device: str) -> Offer | None:
        """Discards a device's upload and what is here of it; returns what was offered.

        None if there is none, or if it is complete: then it is in somebody's hands until `taken`.
        """
        upload = self._uploads.get(device)
        if upload is None or upload.complete:
            return None
        del self._uploads[device]
        upload.part.discard()
        return upload.offer

    def drop_all(self) -> list[tuple[str, Offer]]:
        """Discards every upload, since their round is over; returns what was offered."""
        dropped = [(device, self.drop(device)) for device in list(self._uploads)]
        return [(device, offer) for device, offer in dropped if offer is not None]

    def heard_again(self, now: float) -> None:
        """The link was down: nobody was silent meanwhile."""
        for upload in self._uploads.values():
            upload.silent_since = now

    def clear(self, round_number: int) -> None:
        """Removes the files of a round whose version is stored, or that was abandoned."""
        shutil.rmtree(self.folder / str(round_number), ignore_errors=True)

    def keep_only(self, round_number: int | None) -> None:
        """Removes the files of every other round: what an earlier process left."""
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                if folder.name != str(round_number):
                    shutil.rmtree(folder, ignore_errors=True)

    def expired(self, now: float) -> Sequence[Reply]:
        """Takes slots from devices that went silent and gives them to those that wait."""
        if all(upload.granted for upload in self._uploads.values()):
            return ()
        for upload in list(self._uploads.values()):
            silent = now - upload.silent_since >= self._silence_s
            if upload.granted and silent and not upload.complete:
                upload.granted = False
                self._uploads.move_to_end(upload.device)
        return self._fill_slots(now)

    def next_expiry(self) -> float | None:
        """When `expired` should be called next: None while nobody waits for a slot."""
        times = [
            upload.silent_since + self._silence_s
            for upload in self._uploads.values()
            if upload.granted and not upload.complete
        ]
        waiting = any(not upload.granted for upload in self._uploads.values())
        return min(times) if waiting and times else None

    def _fill_slots(self, now: float) -> Sequence[Reply]:
        free = self._slots - sum(upload.granted for upload in self._uploads.values())
        waiting = [upload for upload in self._uploads.values() if not upload.granted]
        return tuple(self._grant(upload, now) for upload in waiting[: max(0, free)])

    def _grant(self, upload: Upload, now: float) -> Reply:
        upload.granted = True
        upload.silent_since = now
        upload.since_have = 0
        return upload.device, Grant(
            round=upload.offer.round,
            sha256=upload.offer.update.sha256,
            window=self._window,
            held=upload.part.receiver.held.encode(),
        )

    def _have(self, upload: Upload) -> Have:
        return Have(
            round=upload.offer.round,
            sha256=upload.offer.update.sha256,
            held=upload.part.receiver.held.encode(),
        )
