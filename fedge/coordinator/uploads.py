"""The upload desk: who may send an update now, and how much of it is here.

Credit keeps the broker's queues short: at most `slots` devices send at a time, each at most
`window` chunks ahead of what was verified here; beyond its queue a broker drops what it has
acknowledged. Both begin at what is configured and follow what the broker really carries (`Credit`,
`Turn`). The others wait in line, first come first served, and a turn lasts as long as chunks come:
a device that falls silent goes to the end of the line and keeps its chunks. Offering again changes
nothing, another update of the same device waits anew.

Only uploads that have a slot, and a few more, have a file open: a large fleet in line costs neither
descriptors nor disk. A disk that refuses a chunk makes the desk rest, and then try with one chunk.
The desk decides and writes verified chunks; it knows no topic and no round.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.coordinator.credit import Credit
from fedge.coordinator.turn import Turn
from fedge.schemas.blob_files import BlobDirectory, PartialBlob, disk
from fedge.schemas.errors import PeerError, RejectReason, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Grant, Have, Offer

log = EventLog(__name__)

SAFE_QUEUE_MESSAGES = 1000
TURN_SILENCES = 8
"""While others wait, no turn is longer than so many `silence_s`, even if chunks trickle in."""
DISK_PAUSE_S = 5.0
"""How long nobody is asked for chunks after the disk refused one."""
LINK_PAUSE_S = 1.0
"""How long nothing is due after the link was found to be down."""
SPARE_FILES = 64
"""Files kept open for devices that lost their slot and may still have chunks on their way."""


@dataclass(slots=True, eq=False)
class Upload:
    """One update on its way. `file`: open while chunks are expected. `turn`: while it has a slot.

    `handed_over`: complete, and in somebody's hands until `UploadDesk.taken`.
    """

    device: str
    offer: Offer
    file: PartialBlob | None = None
    turn: Turn | None = None
    handed_over: bool = False

    @property
    def part(self) -> PartialBlob:
        """The open file. Raises `RuntimeError` while the upload only waits in line."""
        if self.file is None:
            raise RuntimeError(f"the upload of {self.device} has no file open")
        return self.file

    @property
    def complete(self) -> bool:
        """Whether every chunk is here and verified."""
        return self.file is not None and self.file.receiver.complete


Reply = tuple[str, Grant | Have]
"""A device and what to tell it."""


class UploadDesk:
    """Uploads by device: one each. Files lie in `folder`, in a folder a round and a device.

    `slots`, `window`: the most of both; their product must stay below 1,000, the queue of a broker
    with default settings. `silence_s`: a device with a slot from which nothing new comes for so
    long gives it to the next in line.
    """

    def __init__(self, folder: Path, *, slots: int, window: int, silence_s: float = 15.0) -> None:
        if slots * window >= SAFE_QUEUE_MESSAGES:
            raise ValueError(f"{slots} slots of {window} chunks overrun a broker's queue of 1,000")
        self.folder = folder
        self.credit = Credit(slots, window)
        self._silence_s = silence_s
        self._uploads: dict[str, Upload] = {}
        self._line: OrderedDict[str, Upload] = OrderedDict()
        self._sending: dict[str, Upload] = {}
        self._resting_until: float | None = None
        self._not_before = 0.0
        self._least_told = self.credit.most

    def __len__(self) -> int:
        return len(self._uploads)

    @property
    def on_their_way(self) -> int:
        """Chunks that may be on their way now, by the grants that were given."""
        return sum(turn.window for _, turn in self._turns())

    def directory(self, round_number: int, device: str) -> BlobDirectory:
        """Where a device's update of a round lies: two devices may send the same bytes."""
        return BlobDirectory(self._place(round_number, device))

    # ------------------------------------------------------------ what devices say

    def offered(self, device: str, offer: Offer, now: float) -> Sequence[Reply]:
        """Takes a device into the line; repeats are answered from where it stands.

        Another update of the same device replaces the first, whose chunks are discarded. Raises
        `StoreUnavailable` if its file cannot be opened now; the device is not in line then.
        """
        upload = self._uploads.get(device)
        if upload is not None and not _is_same(upload.offer, offer):
            if upload.complete:
                # It is being decided; the device offers again when it has no receipt for this one.
                return ()
            self.drop(device)
            upload = None
        if upload is None:
            upload = Upload(device, offer)
            if self._has_room() or any(self._left_behind(offer.round, device)):
                upload.file = self._open(upload)
            self._uploads[device] = upload
            if not upload.complete:
                self._line[device] = upload
                self._close_spare_files()
        elif upload.turn is not None and not upload.complete and self._resting_until is None:
            if upload.turn.pace_s is not None and now < upload.turn.doubt_at(self._silence_s):
                # It is sending: a new grant would only have it send again what is on its way.
                return ()
            upload.turn.suspected = None
            return self._grant_again(upload, upload.turn, now)
        return self._fill_slots(now)

    def received(
        self, device: str, sha256: str, index: int, payload: bytes, now: float
    ) -> tuple[Sequence[Reply], Upload | None]:
        """Verifies and writes a chunk. Returns what to tell, and the upload if it is complete now.

        A complete upload keeps its slot until `taken`. A chunk from a device that lost its slot
        long ago may be ignored: it comes again with the next grant. Raises `PeerError`: not_needed
        for a chunk of nothing that was offered, else as `BlobRef.check_chunk`; and
        `StoreUnavailable` if the disk refused: the chunk is asked for again in a while.
        """
        upload = self._uploads.get(device)
        if upload is None or upload.offer.update.sha256 != sha256:
            raise PeerError(RejectReason.NOT_NEEDED, f"a chunk of no open upload: {sha256[:12]}")
        if upload.file is None:
            return (), None
        try:
            fresh = upload.file.receiver.receive(index, payload)
        except StoreUnavailable:
            self._rest(now)
            raise
        turn = upload.turn
        if turn is not None:
            lost_under = turn.resolve(fresh=fresh)
            if lost_under is not None:
                self._lost(upload, lost_under)
        if not fresh:
            return (), None
        replies: list[Reply] = []
        if self._resting_until is not None:
            replies += self._go_on(upload, now)
        if turn is not None:
            turn.arrived(index, now)
            if turn.generation == self.credit.generation and (self._line or turn.limited):
                self.credit.arrived()
        if upload.complete:
            upload.handed_over = True
            self._line.pop(device, None)
            return replies, upload
        if turn is not None:
            replies += self._answer(upload, turn, now)
        return replies, None

    def arrived(self, device: str) -> Upload | None:
        """A device's upload of which nothing was missing when it was offered, once; else None.

        So it is after a coordinator was killed between the last chunk and the decision.
        """
        upload = self._uploads.get(device)
        if upload is None or not upload.complete or upload.handed_over:
            return None
        upload.handed_over = True
        return upload

    # ------------------------------------------------------------ ends

    def taken(self, upload: Upload, now: float) -> Sequence[Reply]:
        """Ends an upload that was decided; its slot goes to the next in line."""
        if self._uploads.get(upload.device) is upload:
            self._remove(upload.device)
        if upload.file is not None:
            upload.file.close()
        return self._fill_slots(now)

    def drop(self, device: str) -> Offer | None:
        """Discards a device's upload and what is here of it; returns what was offered.

        None if there is none, or if it is complete: then it is in somebody's hands until `taken`.
        """
        upload = self._uploads.get(device)
        if upload is None or upload.complete:
            return None
        self._remove(device)
        # What the disk does not let go now goes with its round (`keep_only`).
        with contextlib.suppress(StoreError):
            if upload.file is not None:
                upload.file.discard()
            elif any(self._left_behind(upload.offer.round, device)):
                self.directory(upload.offer.round, device).delete(upload.offer.update.sha256)
        return upload.offer

    def drop_all(self) -> list[tuple[str, Offer]]:
        """Discards every upload, since their round is over; returns what was offered."""
        dropped = [(device, self.drop(device)) for device in list(self._uploads)]
        return [(device, offer) for device, offer in dropped if offer is not None]

    def keep_only(self, rounds: Collection[int]) -> None:
        """Removes the files of every other round: their versions are stored, or were abandoned."""
        kept = {str(number) for number in rounds}
        with disk(f"list {self.folder}"):
            found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        for folder in found:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------ time

    def heard_again(self, now: float) -> None:
        """The link was down: nobody was silent meanwhile, and what was on its way may be gone.

        Whoever calls this instead of `expired`, because it is down still, is called again later.
        """
        self.credit.excuse()
        self._not_before = now + LINK_PAUSE_S
        for _, turn in self._turns():
            turn.excuse(now)

    def expired(self, now: float) -> Sequence[Reply]:
        """Asks silent devices again, and gives their slots away where others wait.

        After the disk refused a chunk, one device is asked for one chunk, until it can be written.
        """
        if self._resting_until is not None:
            return self._try_the_disk(now) if now >= self._resting_until else ()
        replies: list[Reply] = []
        others_wait = bool(self._line)
        for upload, turn in list(self._turns()):
            if others_wait and now >= self._turn_ends_at(turn):
                upload.turn = None
                del self._sending[upload.device]
                self._line[upload.device] = upload
            elif now >= turn.doubt_at(self._silence_s):
                lost_under = turn.doubt(upload.part.receiver.held)
                if lost_under is not None:
                    self._lost(upload, lost_under)
                replies += self._grant_again(upload, turn, now)
        replies += self._fill_slots(now)
        self._close_spare_files()
        return replies

    def next_expiry(self) -> float | None:
        """When `expired` should be called next: None while there is nothing to wait for."""
        turns = [turn for _, turn in self._turns()]
        if self._resting_until is not None:
            later = max(self._resting_until, self._not_before)
            return later if turns or self._line else None
        times = [turn.doubt_at(self._silence_s) for turn in turns]
        if self._line:
            times += [self._turn_ends_at(turn) for turn in turns]
            if self._has_room():
                # A dropped upload left its slot: at once, but for a link that is down.
                times.append(self._not_before)
        return min(times, default=None)

    # ------------------------------------------------------------ turns

    def _turns(self) -> Iterator[tuple[Upload, Turn]]:
        """Who has a slot and is not complete."""
        for upload in self._sending.values():
            if upload.turn is not None and not upload.complete:
                yield upload, upload.turn

    def _turn_ends_at(self, turn: Turn) -> float:
        return min(turn.heard_at + self._silence_s, turn.began_at + TURN_SILENCES * self._silence_s)

    def _answer(self, upload: Upload, turn: Turn, now: float) -> Sequence[Reply]:
        """What a chunk from a device with a slot is answered with."""
        if self._resting_until is not None:
            return ()
        held = upload.part.receiver.held
        if turn.has_lost(held):
            self._lost(upload, turn.generation)
            return self._grant_again(upload, turn, now)
        if turn.is_spent(held):
            return self._grant_again(upload, turn, now)
        # Half a window, so that the sender never waits for the answer to its last chunk. Without
        # an answer it comes to a halt, and then loses nothing by another window.
        due = turn.limited and turn.since_told >= max(1, turn.window // 2)
        if not due or turn.has_gap(held) or self._wants_another_window(turn):
            return ()
        turn.tell(held, now)
        have = Have(round=upload.offer.round, sha256=upload.offer.update.sha256, held=held.encode())
        return ((upload.device, have),)

    def _wants_another_window(self, turn: Turn) -> bool:
        fitting = self._window_for(turn)
        return fitting < turn.window or fitting >= turn.window + max(1, turn.window // 2)

    def _window_for(self, turn: Turn) -> int:
        """The window that a device may have beside the others; below 1: none now."""
        windows = [each.window for _, each in self._turns()]
        room = self.credit.total - sum(windows) + turn.window
        return min(self.credit.window, self.credit.total // len(windows), room)

    def _grant_again(self, upload: Upload, turn: Turn, now: float) -> Sequence[Reply]:
        window = self._window_for(turn)
        if window < 1:
            # The credit shrank below what is on its way: it waits at the head of the line.
            upload.turn = None
            del self._sending[upload.device]
            self._line[upload.device] = upload
            self._line.move_to_end(upload.device, last=False)
            return self._fill_slots(now)
        turn.grant(window, upload.part.receiver.held, self.credit.generation, now)
        return (_grant(upload, turn),)

    def _has_room(self) -> bool:
        if self._resting_until is not None or len(self._sending) >= self.credit.slots:
            return False
        return self.credit.total - self.on_their_way >= self.credit.window

    def _fill_slots(self, now: float) -> Sequence[Reply]:
        replies: list[Reply] = []
        while self._line and self._has_room():
            reply = self._begin_turn(next(iter(self._line.values())), self.credit.window, now)
            if reply is None:
                break
            replies.append(reply)
        return replies

    def _begin_turn(self, upload: Upload, window: int, now: float) -> Reply | None:
        """Gives the upload a slot; None if its file cannot be opened now."""
        try:
            if upload.file is None:
                upload.file = self._open(upload)
        except StoreError as error:
            log.error("upload_not_opened", device=upload.device, reason=str(error))
            self._rest(now)
            return None
        del self._line[upload.device]
        self._sending[upload.device] = upload
        held = upload.file.receiver.held
        upload.turn = Turn(now, window, self.credit.generation, held)
        return _grant(upload, upload.turn)

    def _lost(self, upload: Upload, generation: int) -> None:
        if self.credit.lost(generation) and self.credit.total < self._least_told:
            self._least_told = self.credit.total
            log.warning(
                "chunks_lost",
                device=upload.device,
                round=upload.offer.round,
                slots=self.credit.slots,
                window=self.credit.window,
                advice="raise the broker's queue limit, or lower uploads.slots or uploads.window",
            )

    # ------------------------------------------------------------ files

    def _try_the_disk(self, now: float) -> Sequence[Reply]:
        self._resting_until = now + DISK_PAUSE_S
        turns = list(self._turns())
        if turns:
            # Another one each time: this one may be gone.
            upload, turn = min(turns, key=lambda each: each[1].granted_at)
            turn.grant(1, upload.part.receiver.held, self.credit.generation, now)
            return (_grant(upload, turn),)
        if self._line:
            reply = self._begin_turn(next(iter(self._line.values())), 1, now)
            return () if reply is None else (reply,)
        return ()

    def _rest(self, now: float) -> None:
        self._resting_until = now + DISK_PAUSE_S
        self.credit.excuse()

    def _go_on(self, written: Upload, now: float) -> Sequence[Reply]:
        """A chunk could be written again: what the others sent meanwhile is asked for again."""
        self._resting_until = None
        self.credit.excuse()
        replies: list[Reply] = []
        for upload, turn in list(self._turns()):
            turn.excuse(now)
            if upload is not written:
                replies += self._grant_again(upload, turn, now)
        return [*replies, *self._fill_slots(now)]

    def _open(self, upload: Upload) -> PartialBlob:
        offer = upload.offer
        return self.directory(offer.round, upload.device).reopen(offer.update)

    def _place(self, round_number: int, device: str) -> Path:
        return self.folder / str(round_number) / device

    def _left_behind(self, round_number: int, device: str) -> Iterator[Path]:
        """What an earlier process left of a device's update."""
        place = self._place(round_number, device)
        with disk(f"list {place}"):
            return iter(list(place.iterdir()) if place.is_dir() else [])

    def _close_spare_files(self) -> None:
        spare = [upload for upload in self._line.values() if upload.file is not None]
        for upload in spare[SPARE_FILES:]:
            upload.part.close()
            upload.file = None

    def _remove(self, device: str) -> None:
        del self._uploads[device]
        self._sending.pop(device, None)
        self._line.pop(device, None)


def _grant(upload: Upload, turn: Turn) -> Reply:
    return upload.device, Grant(
        round=upload.offer.round,
        sha256=upload.offer.update.sha256,
        window=turn.window,
        held=turn.told.encode(),
    )


def _is_same(one: Offer, other: Offer) -> bool:
    """Whether it is the same update, cut into the same chunks, for the same round."""
    return (one.round, one.update) == (other.round, other.update)
