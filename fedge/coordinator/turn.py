"""One device's turn to send, and what the order of its chunks tells about losses.

A device sends what it lacks in order, and brokers keep the order of one publisher. So as soon as
the last chunk that its credit allowed is here, everything before it that is not here is lost, and
nothing is on its way any more: a new grant then sends no chunk twice. Only the loss of that last
chunk itself, or of the grant, shows as silence; how long a silence is worth a doubt follows from
the device's own pace (as the retransmission timer of TCP does, RFC 6298).

A doubt may be wrong: the device may only have been slow. Then it sends what was still on its way a
second time, and the repeat tells (RFC 3708). Only a device that goes on without a repeat had lost
something.

Pure: times are passed in, in seconds. Knows neither files nor other devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedge.schemas.blobs import ChunkSet

REORDERED_CHUNKS = 3
"""So many later chunks are here before a missing one counts as lost: not every broker keeps the
order (three duplicate acknowledgements of TCP, RFC 5681)."""
DOUBT_INTERVALS = 4
DOUBT_ROUND_TRIPS = 2
"""A silence is doubted that is so many times the longest one between two chunks of this turn, and
the longest time from telling a device that it may send to the first chunk that this allowed."""
EARLIEST_DOUBT_S = 1.0


@dataclass(slots=True, eq=False)
class Turn:
    """From the first grant until the device is done or has lost its slot.

    `window`: chunks that it may be ahead of what it was told. `generation`: of the credit, when
    they were granted. `heard_at`: when a chunk that was missing came last.
    """

    began_at: float
    window: int
    generation: int
    told: ChunkSet
    """What the device was told last to be here."""
    before: ChunkSet = field(init=False)
    """What was here at the last grant."""
    frontier: int | None = field(init=False)
    """The last chunk that it may have sent: it sends what it lacks in order."""
    heard_at: float = field(init=False)
    granted_at: float = field(init=False)
    since_told: int = 0
    pace_s: float | None = None
    """How long it may be silent before that is doubted, as far as its chunks have told."""
    doubts: int = 0
    suspected: int | None = None
    """The generation of what may be lost, while that is in doubt."""
    fresh_since_doubt: int = 0
    _timed: tuple[int, float] | None = None
    """The chunk after which one was allowed that is waited for, and since when."""

    def __post_init__(self) -> None:
        self.heard_at = self.began_at
        self.grant(self.window, self.told, self.generation, self.began_at)

    def grant(self, window: int, held: ChunkSet, generation: int, now: float) -> None:
        """The device is told to begin anew from `held`, with this window."""
        self.window, self.generation, self.granted_at = window, generation, now
        self.before = held.copy()
        self.frontier = None
        self._timed = None
        self.tell(held, now)

    def tell(self, held: ChunkSet, now: float) -> None:
        """The device is told what is here, which frees its credit."""
        if self._timed is None:
            self._timed = (-1 if self.frontier is None else self.frontier, now)
        self.told = held.copy()
        self.frontier = self.told.frontier(self.window)
        self.since_told = 0

    @property
    def limited(self) -> bool:
        """Whether the device has more to send than it may."""
        return self.told.chunk_count - len(self.told) > self.window

    def arrived(self, index: int, now: float) -> None:
        """A chunk came that was missing."""
        interval_s = now - max(self.heard_at, self.granted_at)
        self.pace_s = max(self.pace_s or EARLIEST_DOUBT_S, DOUBT_INTERVALS * interval_s)
        if self._timed is not None and index > self._timed[0]:
            self.pace_s = max(self.pace_s, DOUBT_ROUND_TRIPS * (now - self._timed[1]))
            self._timed = None
        self.heard_at = now
        self.since_told += 1
        self.doubts = 0

    def has_gap(self, held: ChunkSet) -> bool:
        """Whether a chunk is missing though enough later ones of the same grant are here."""
        first = held.first_missing()
        return first is not None and held.added_beyond(first, self.before) >= REORDERED_CHUNKS

    def is_spent(self, held: ChunkSet) -> bool:
        """Whether the last chunk that the device may send is here: nothing more is on its way."""
        return self.frontier is not None and self.frontier in held

    def has_lost(self, held: ChunkSet) -> bool:
        """Whether something before that last chunk is missing."""
        first = held.first_missing()
        return self.is_spent(held) and first is not None and first < (self.frontier or 0)

    def doubt_at(self, silence_s: float) -> float:
        """When to ask a silent device again, at the latest after `silence_s`, ever more rarely."""
        # Past 2**16 the silence decides anyway.
        patience_s = silence_s if self.pace_s is None else self.pace_s * 2.0 ** min(self.doubts, 16)
        return max(self.heard_at, self.granted_at) + min(patience_s, silence_s)

    def doubt(self, held: ChunkSet) -> int | None:
        """It was silent too long. Returns the generation of a loss that is certain, else None."""
        self.doubts += 1
        self.fresh_since_doubt = 0
        if self.has_gap(held):
            self.suspected = None
            return self.generation
        if self.suspected is None:
            self.suspected = self.generation
        return None

    def resolve(self, *, fresh: bool) -> int | None:
        """A chunk came. Returns the generation of a loss that is certain now, else None."""
        suspected = self.suspected
        if suspected is None:
            return None
        if not fresh:
            self.suspected = None
            return None
        self.fresh_since_doubt += 1
        # The repeat of the first, if there is one, comes before the second.
        if self.fresh_since_doubt < 2:
            return None
        self.suspected = None
        return suspected

    def excuse(self, now: float) -> None:
        """Nobody could be heard until now."""
        self.began_at = self.heard_at = self.granted_at = now
        self.doubts = 0
        self.suspected = None
