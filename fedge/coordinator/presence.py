"""Presence: births, wills and the roll, as they come over the control session.

`Attendance` decides who is online; this asks the devices, tells the journal, and keeps the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedge.coordinator.attendance import Attendance
from fedge.coordinator.journal import Journal
from fedge.coordinator.publisher import Publisher
from fedge.schemas.link.protocol import Link
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import Presence
from fedge.schemas.topics import Topics

log = EventLog(__name__)

ROLL_GRACE_S = 10.0
"""A connected device answers the roll within this and the time over which answers are spread."""
QUIET_S = 1.0
"""While the roll is called, all are known who will be when nobody new has come for so long."""


class PresenceDesk:
    """Who is connected. `answers_per_s`: how many answers to the roll are wanted at most.

    `wake`: the time of the next deadline has changed.
    """

    def __init__(
        self,
        journal: Journal,
        publisher: Publisher,
        control: Link,
        topics: Topics,
        *,
        answers_per_s: float,
        clock: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        self._attendance = Attendance()
        self._journal = journal
        self._publisher = publisher
        self._control = control
        self._topics = topics
        self._answers_per_s = answers_per_s
        self._clock = clock
        self._wake = wake
        self._settles_at: float | None = None
        self._has_called_roll = False

    def recover(self, online: Iterable[str]) -> None:
        """Begins with those who were online when the coordinator last knew."""
        self._attendance = Attendance(online)

    def keep_only(self, devices: Iterable[str]) -> None:
        """Forgets every other device."""
        self._attendance.keep_only(devices)

    @property
    def online(self) -> frozenset[str]:
        """The devices that are believed to be connected."""
        return self._attendance.online

    @property
    def all_known(self) -> bool:
        """Whether `online` is everybody: not while devices still answer the roll one by one.

        A coordinator with an empty store, or one that was away while a fleet came, hears of a
        thousand devices within seconds; the first hundred of them are not the fleet.
        """
        return self._settles_at is None or self._clock() >= self._settles_at

    @property
    def has_called_roll(self) -> bool:
        """Whether anybody was asked in this life: before that, only the store knows devices."""
        return self._has_called_roll

    @property
    def next_deadline(self) -> float | None:
        """When `time_passed` should be called; never while nobody could answer the roll."""
        if not self._control.connected:
            return None
        times = [t for t in (self._attendance.roll_ends, self._settles_at) if t is not None]
        return min(times, default=None)

    def heard(self, device: str, presence: Presence, *, retained: bool) -> None:
        """A birth or a will."""
        online, was_online = presence.online, device in self._attendance.online
        if not self._attendance.present(device, presence.boot, online=online, retained=retained):
            # The will of an earlier life: the device has started again since.
            return
        self._journal.saw(
            device,
            boot=presence.boot,
            online=online,
            agent_version=presence.agent_version or None,
        )
        if online != was_online:
            log.info("device_online" if online else "device_offline", device=device)
            if online:
                self._somebody_came()

    def spoke(self, device: str) -> None:
        """Any other message came over the device's control session."""
        if self._attendance.heard(device):
            log.info("device_online", device=device)
            self._journal.saw(device, online=True)
            self._somebody_came()

    async def call_roll(self) -> None:
        """The control session is up (again): everyone who is there should say so.

        The retained births come once more, and every device that hears the call says its own.
        """
        spread_s = max(1.0, len(self._attendance) / self._answers_per_s)
        self._attendance.call_roll(ends_at=self._clock() + spread_s + ROLL_GRACE_S)
        self._settles_at = self._clock() + QUIET_S
        self._has_called_roll = True
        self._wake()
        await self._control.subscribe(*self._topics.coordinator_control)
        await self._publisher.call_roll(spread_s)

    def time_passed(self) -> None:
        """Who did not answer the roll in time is offline."""
        if not self._control.connected:
            # Nobody could answer; the next connection calls again.
            return
        if self.all_known:
            self._settles_at = None
        for device in sorted(self._attendance.absent(self._clock())):
            log.info("device_offline", device=device, reason="it did not answer the roll")
            self._journal.saw(device, online=False)

    def _somebody_came(self) -> None:
        ends_at = self._attendance.roll_ends
        if self._settles_at is not None and ends_at is not None:
            # Never beyond the roll: one device that comes and goes must not hold up the others.
            self._settles_at = min(self._clock() + QUIET_S, ends_at)
