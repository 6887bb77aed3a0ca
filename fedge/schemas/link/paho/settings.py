"""What a link must be told about its broker and its session, and how long it waits to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

from fedge.schemas.errors import ConfigError
from fedge.schemas.link.protocol import Will

MQTT_MAX_PACKET_BYTES = 268_435_455
"""The largest remaining length that the protocol can express (MQTT 5, section 1.5.5)."""


class MqttProtocol(StrEnum):
    """Which MQTT the link speaks. `AUTO`: 5, or 3.1.1 where the broker does not know 5."""

    AUTO = "auto"
    V5 = "5"
    V311 = "3.1.1"


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """One MQTT session at one broker.

    `client_id` names the session: one link at a time may use it. `session_expiry_s`: how long the
    broker keeps the session without us (MQTT 5; under 3.1.1 the broker decides).
    `receive_maximum`: deliveries that may wait for `Link.ack`. `max_packet_bytes`: the broker's
    limit where it does not say it itself (3.1.1). `largest_delivery_bytes`: no larger packet is
    taken (MQTT 5: the broker is told, and drops what is larger). `answer_limit_s`: a broker that
    answers pings but no publish or subscription for so long is left.
    `filters_per_subscribe`: AWS IoT takes 8. `auto_answer_s`: under `AUTO`, how long a broker may
    be silent on our first MQTT 5 before 3.1.1 is tried (amqtt waits for bytes that it misread, and
    never answers).
    `backoff_base_s`, `backoff_cap_s`: see `Backoff`.

    Raises `ConfigError` for values that cannot work.
    """

    host: str
    port: int
    client_id: str
    protocol: MqttProtocol = MqttProtocol.AUTO
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    will: Will | None = field(default=None, repr=False)
    keepalive_s: int = 30
    session_expiry_s: int = 7 * 86400
    receive_maximum: int = 32
    max_packet_bytes: int = MQTT_MAX_PACKET_BYTES
    largest_delivery_bytes: int = 2 * 1024 * 1024
    answer_limit_s: float = 120.0
    filters_per_subscribe: int = 8
    connect_timeout_s: float = 10.0
    auto_answer_s: float = 2.0
    backoff_base_s: float = 1.0
    backoff_cap_s: float = 60.0

    def __post_init__(self) -> None:
        self._require("host", bool(self.host), "a name or an address")
        self._require("port", 1 <= self.port <= 65535, "1 to 65535")
        self._require("client_id", 1 <= len(self.client_id.encode()) <= 65535, "a non-empty name")
        self._require("keepalive_s", 1 <= self.keepalive_s <= 65535, "1 to 65535 seconds")
        self._require("session_expiry_s", 0 <= self.session_expiry_s < 2**32, "below 2**32 seconds")
        self._require("receive_maximum", 1 <= self.receive_maximum <= 65535, "1 to 65535")
        self._require(
            "largest_delivery_bytes",
            1024 <= self.largest_delivery_bytes <= MQTT_MAX_PACKET_BYTES,
            f"1024 to {MQTT_MAX_PACKET_BYTES}",
        )
        self._require("answer_limit_s", self.answer_limit_s > 0, "more than 0 seconds")
        self._require("filters_per_subscribe", self.filters_per_subscribe >= 1, "1 or more")
        self._require("connect_timeout_s", self.connect_timeout_s > 0, "more than 0 seconds")
        self._require("auto_answer_s", self.auto_answer_s > 0, "more than 0 seconds")
        self._require("backoff_base_s", self.backoff_base_s > 0, "more than 0 seconds")
        self._require(
            "backoff_cap_s", self.backoff_cap_s >= self.backoff_base_s, "the base or more"
        )
        if self.password is not None:
            self._require("username", self.username is not None, "set where there is a password")

    @staticmethod
    def _require(name: str, holds: bool, advice: str) -> None:
        if not holds:
            raise ConfigError(f"the link's {name} must be {advice}")


class Backoff:
    """How long to wait before the next attempt: uniform in 0 to min(cap, base * 2**n), in seconds.

    Full jitter: a fleet that lost its broker at one moment does not come back at one moment
    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """

    def __init__(self, base_s: float, cap_s: float, rng: random.Random) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._rng = rng
        self._attempts = 0

    def next_delay_s(self, lasted_s: float) -> float:
        """The next wait, after a connection that lasted `lasted_s` (0 if there was none).

        Only a connection that lasted longer than the cap starts the series anew: two clients that
        take one session from each other connect well each time, and must slow down all the same.
        """
        if lasted_s > self._cap_s:
            self._attempts = 0
        # Past 2**32 the cap decides anyway, and floats overflow later.
        limit_s = min(self._cap_s, self._base_s * 2.0 ** min(self._attempts, 32))
        self._attempts += 1
        return self._rng.uniform(0.0, limit_s)

    @property
    def attempts(self) -> int:
        """Attempts since the series began."""
        return self._attempts

    def slow_down(self) -> None:
        """The next wait is drawn up to the cap: trying sooner could do nothing but harm."""
        self._attempts = max(self._attempts, 32)
