"""Attendance: which devices are connected now, as well as anybody can know.

Births and wills say it while broker and coordinator live. After a broker was killed they may say
nothing, or what was true before: a device that died with it left no will. So whenever the
coordinator's own connection was down, it calls the roll: who does not answer within the time given
is absent, whatever was retained. A death of an older boot than the last birth is ignored (MQTT 5,
section 3.1.2.5: a will may come long after its owner is back). Pure; the clock is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable


class Attendance:
    """Who is online. `online`: names of devices known from an earlier life, not confirmed yet."""

    def __init__(self, online: Iterable[str] = ()) -> None:
        self._online = set(online)
        self._boots: dict[str, int] = {}
        self._unconfirmed = set(self._online)
        self._roll_ends: float | None = None

    @property
    def online(self) -> frozenset[str]:
        """The devices that are believed to be connected."""
        return frozenset(self._online)

    def __len__(self) -> int:
        return len(self._online)

    def present(self, device: str, boot: int, *, online: bool, retained: bool) -> bool:
        """A birth or a death was heard. Returns whether it counts: False for an old death.

        `retained`: the broker kept it; it proves nothing about now while the roll is called.
        """
        if not online and boot < self._boots.get(device, 0):
            return False
        self._boots[device] = boot
        if not online:
            self._online.discard(device)
            self._unconfirmed.discard(device)
            return True
        self._online.add(device)
        if retained and self._roll_ends is not None:
            self._unconfirmed.add(device)
        else:
            self._unconfirmed.discard(device)
        return True

    def keep_only(self, devices: Iterable[str]) -> None:
        """Forgets every other device."""
        known = set(devices)
        self._online &= known
        self._unconfirmed &= known
        self._boots = {device: boot for device, boot in self._boots.items() if device in known}

    def heard(self, device: str) -> bool:
        """Any message came from the device just now. Returns whether it was thought absent."""
        self._unconfirmed.discard(device)
        if device in self._online:
            return False
        self._online.add(device)
        return True

    def call_roll(self, *, ends_at: float) -> None:
        """From now on everyone must be heard of before `ends_at`."""
        self._unconfirmed = set(self._online)
        self._roll_ends = ends_at

    @property
    def roll_ends(self) -> float | None:
        """When `absent` should be called; None while no roll is called."""
        return self._roll_ends

    def absent(self, now: float) -> frozenset[str]:
        """Ends the roll if its time is over: those who did not answer are offline from now on."""
        if self._roll_ends is None or now < self._roll_ends:
            return frozenset()
        gone = frozenset(self._unconfirmed)
        self._online -= gone
        self._unconfirmed = set()
        self._roll_ends = None
        return gone
