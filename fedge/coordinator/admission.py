"""Admission: how many devices the coordinator knows at all, and how often each may speak.

Whoever can publish could otherwise fill the disk with names and the loop with messages. A device
within its rate notices nothing; above it, its messages are dropped and counted, and an honest
device says again later what had no answer. A name is taken up with the first message that can be
read, and given up when the operator's retention forgets the device. Pure; the clock is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedge.schemas.errors import PeerError, RejectReason

MESSAGES_PER_S = 20.0
"""Control messages a device may send on average. An honest one sends a few in a round."""
BURST = 200
"""…and at once, as after a reconnect."""
STRANGERS_PER_S = 200.0
STRANGERS_BURST = 2000
"""The same for all together that are not known yet: a new fleet that says hello."""
FORGET_ABOVE = 10_000
"""So many rates are remembered before those of quiet devices are forgotten."""

_STRANGERS = ""
"""No device's name."""


class Admission:
    """The devices that may speak. `known`: those of earlier lives; `limit`: names at most."""

    def __init__(self, known: Iterable[str], *, limit: int) -> None:
        self._known = set(known)
        self._limit = limit
        self._spent: dict[str, tuple[float, float]] = {}
        self._forget_above = FORGET_ABOVE

    def listen(self, device: str, now: float) -> None:
        """Returns if a message of the device may be looked at now.

        Raises `PeerError` (limit_exceeded): too many devices, or too many messages of this one.
        """
        name, rate, burst = device, MESSAGES_PER_S, BURST
        if device not in self._known:
            self._check_room()
            name, rate, burst = _STRANGERS, STRANGERS_PER_S, STRANGERS_BURST
        spent, since = self._spent.get(name, (0.0, now))
        spent = max(0.0, spent - (now - since) * rate) + 1
        if spent > burst:
            raise PeerError(RejectReason.LIMIT_EXCEEDED, f"more than {rate:g} messages/s")
        self._spent[name] = (spent, now)
        if len(self._spent) > self._forget_above:
            self._forget_quiet(now)

    def admit(self, device: str) -> None:
        """Takes up the name of a device that has said something. Raises as `listen` does."""
        if device not in self._known:
            self._check_room()
            self._known.add(device)

    def keep_only(self, devices: Iterable[str]) -> None:
        """Gives up every other name."""
        self._known = set(devices)

    def _check_room(self) -> None:
        if len(self._known) >= self._limit:
            raise PeerError(
                RejectReason.LIMIT_EXCEEDED,
                f"{len(self._known)} devices are known: raise round.max_devices",
            )

    def _forget_quiet(self, now: float) -> None:
        busy = BURST / MESSAGES_PER_S
        self._spent = {d: (s, t) for d, (s, t) in self._spent.items() if now - t < busy}
        # Not at each message of a fleet that is busy altogether.
        self._forget_above = max(FORGET_ABOVE, 2 * len(self._spent))

    def is_known(self, device: str) -> bool:
        """Whether a record may be kept under this name."""
        return device in self._known
