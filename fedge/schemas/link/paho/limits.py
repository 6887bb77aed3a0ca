"""How large a packet this broker takes: what it says, and what it was found not to take.

MQTT 5 brokers say it at each connection. Others just end the connection upon a larger packet, as
often as it is sent; after `Outbox` has found the culprit, nothing as large is sent for some time.
A broker that comes back may have other limits, so an end for another reason makes us forget.
"""

from __future__ import annotations

from fedge.schemas.errors import PayloadTooLarge

TOPIC_ALLOWANCE_BYTES = 256
"""Topics of Fedge are shorter than this."""
MEMORY_S = 600.0
"""What was found is tried again after so long."""
OVERHEAD_BYTES = 1 + 4 + 2 + 2 + 1 + 5
"""Of a PUBLISH: type, remaining length, topic length, packet identifier, length of the properties,
and the only one that is used, the expiry."""


class PacketLimit:
    """The limit of one broker. `configured_bytes`: where it does not say it itself."""

    def __init__(self, configured_bytes: int) -> None:
        self._configured_bytes = configured_bytes
        self._told_bytes = configured_bytes
        self._found_bytes: int | None = None
        self._found_at_s = 0.0

    @property
    def packet_bytes(self) -> int:
        """The largest packet that it takes, as far as is known."""
        if self._found_bytes is None:
            return self._told_bytes
        return min(self._told_bytes, self._found_bytes)

    @property
    def payload_bytes(self) -> int:
        """The same for the payload under any topic of Fedge."""
        return max(self.packet_bytes - OVERHEAD_BYTES - TOPIC_ALLOWANCE_BYTES, 0)

    def told(self, packet_bytes: int) -> None:
        """What the broker said when it accepted a connection."""
        self._told_bytes = min(self._configured_bytes, packet_bytes)

    def check(self, topic: str, payload: bytes) -> None:
        """Raises `PayloadTooLarge` for what it would not take."""
        most_bytes = self.packet_bytes - OVERHEAD_BYTES - len(topic.encode())
        if len(payload) > most_bytes:
            raise PayloadTooLarge(topic, len(payload), max(most_bytes, 0))

    def refused(self, topic: str, payload: bytes, now_s: float) -> int:
        """This ended every connection. Returns the size of its packet, in bytes."""
        size_bytes = OVERHEAD_BYTES + len(topic.encode()) + len(payload)
        self._found_bytes = min(size_bytes - 1, self.packet_bytes)
        self._found_at_s = now_s
        return size_bytes

    def ended(self, *, while_idle: bool, now_s: float) -> None:
        """A connection ended, `while_idle`: with nothing of ours on its way."""
        if while_idle or now_s > self._found_at_s + MEMORY_S:
            self._found_bytes = None
