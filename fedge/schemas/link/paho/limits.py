"""How large a packet this broker takes: what it says, and what it was found not to take.

MQTT 5 brokers say it at each connection. Others just end the connection upon a larger packet, as
often as it is sent; after `Outbox` has found the culprit, nothing above half its size is sent for a
minute, since nothing tells how much less it may be. A broker that comes back may have other limits,
so whatever looks like that makes us forget.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fedge.schemas.errors import PayloadTooLarge

TOPIC_ALLOWANCE_BYTES = 256
"""Topics of Fedge are shorter than this."""
MEMORY_S = 60.0
"""What a broker was found not to take is tried again after so long."""
OVERHEAD_BYTES = 1 + 4 + 2 + 2 + 1 + 5
"""Of a PUBLISH: type, remaining length, topic length, packet identifier, length of the properties,
and the only one that is used, the expiry."""


class PacketLimit:
    """The limit of one broker. `configured_bytes`: where it does not say it itself.

    `clock`: monotonic seconds.
    """

    def __init__(self, configured_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._configured_bytes = configured_bytes
        self._told_bytes = configured_bytes
        self._found_bytes = configured_bytes
        self._found_at_s = float("-inf")
        self._clock = clock
        self._kept_session = False

    @property
    def packet_bytes(self) -> int:
        """The largest packet that it takes, as far as is known."""
        if self._clock() >= self._found_at_s + MEMORY_S:
            return self._told_bytes
        return min(self._told_bytes, self._found_bytes)

    @property
    def payload_bytes(self) -> int:
        """The same for the payload under any topic of Fedge."""
        return max(self.packet_bytes - OVERHEAD_BYTES - TOPIC_ALLOWANCE_BYTES, 0)

    def check(self, topic: str, payload: bytes) -> None:
        """Raises `PayloadTooLarge` for what it would not take."""
        most_bytes = self.packet_bytes - OVERHEAD_BYTES - len(topic.encode())
        if len(payload) > most_bytes:
            raise PayloadTooLarge(topic, len(payload), max(most_bytes, 0))

    def connected(self, packet_bytes: int, *, session_present: bool) -> None:
        """The broker accepted a connection and told its limit.

        If it kept our session before and has none now, it was restarted or is another.
        """
        self._told_bytes = min(self._configured_bytes, packet_bytes)
        if self._kept_session and not session_present:
            self._forget()
        self._kept_session = session_present

    def refused(self, topic: str, payload: bytes) -> int:
        """This ended every connection. Returns the size of its packet, in bytes."""
        size_bytes = OVERHEAD_BYTES + len(topic.encode()) + len(payload)
        self._found_bytes = min(size_bytes // 2, self.packet_bytes)
        self._found_at_s = self._clock()
        return size_bytes

    def ended_idle(self) -> None:
        """A connection ended with nothing of ours on its way: not because of a packet."""
        self._forget()

    def _forget(self) -> None:
        self._found_at_s = float("-inf")
