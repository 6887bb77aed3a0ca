"""The fleet as a rollout sees it: where each device stands in it, who is there, and who vanished.

A share is chosen over every device that is known, also who is away now: a coordinator that comes
back, or is restored, hears of its fleet bit by bit, and the first who come are not the fleet. It
knows no store and asks nobody; the devices and the time are passed in.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from fedge.coordinator.rollouts import Fleet
from fedge.schemas.rollout_share import place_of

RECENT_S = 86400.0
"""A device that was not seen for longer is not waited for."""


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device whose birth was heard. `last_seen_at`: seconds since the epoch."""

    name: str
    online: bool
    last_seen_at: float

    def is_recent(self, now: float) -> bool:
        """Whether it is there, or was lately."""
        return self.online or self.last_seen_at > now - RECENT_S


class RolloutFleet:
    """The fleet of rollout `number`, which began at `started_at`, seconds since the epoch."""

    def __init__(self, population: str, number: int, started_at: float) -> None:
        self.number = number
        self._population = population
        self._started_at = started_at
        self._here_since = started_at - RECENT_S
        # A hash for each device of a large fleet is made once a rollout.
        self._places: dict[str, float] = {}
        self._were_here: set[str] = set()

    def place(self, device: str) -> float:
        """Where the device stands, from 0 to below 1."""
        found = self._places.get(device)
        if found is None:
            found = self._places[device] = place_of(self._population, self.number, device)
        return found

    def look(self, devices: Iterable[KnownDevice], *, now: float, listened_s: float) -> Fleet:
        """The places of the devices. `now`: seconds since the epoch.

        `listened_s`: for how long everybody could be heard. Only after a day of it are those left
        out who were away for a day when the rollout began and did not come since: they would be
        waited for in vain. Who was here once counts to the end, seen or not, forgotten or not: what
        the candidate has silenced must not make room for more.
        """
        recent, connected, away = [], [], []
        for device in devices:
            place = self.place(device.name)
            if device.online:
                connected.append(place)
            if device.is_recent(now):
                recent.append(place)
            if device.online or device.last_seen_at > self._here_since:
                self._were_here.add(device.name)
            elif device.name not in self._were_here and listened_s < RECENT_S:
                away.append(place)
        known = [self._places[name] for name in self._were_here] + away
        return Fleet(sorted(known), sorted(recent), sorted(connected))

    def vanished(
        self,
        devices: Iterable[KnownDevice],
        *,
        share: float,
        answered: Container[str],
        now: float,
    ) -> tuple[str, ...]:
        """Who is in the share and came since the rollout began, but is silent since a day; by name.

        Who answered is not among them. `now`: seconds since the epoch.
        """
        return tuple(
            sorted(
                device.name
                for device in devices
                if device.name not in answered
                and self.place(device.name) < share
                and device.last_seen_at > self._started_at
                and not device.is_recent(now)
            )
        )
