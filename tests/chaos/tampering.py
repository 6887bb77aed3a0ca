"""A broker that breaks its word, played by the proxy: PUBLISH packets are lost, doubled, delayed.

A publish that is swallowed is acknowledged all the same, by a forged PUBACK, so its sender believes
that it arrived: this is what brokers do whose queue is full, or that are killed a moment later. The
packets are judged one by one; no socket, no clock and no task is known here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tests.chaos.mqtt_wire import (
    DUPLICATE_FLAG,
    PacketType,
    Publish,
    acknowledged_id,
    is_v5,
    packet_type,
    parse_publish,
    puback,
)


class Side(StrEnum):
    """The direction of a packet: up to the broker or down to its client."""

    UP = "up"
    DOWN = "down"

    @property
    def reverse(self) -> Side:
        """The other one."""
        return Side.DOWN if self is Side.UP else Side.UP


class Mischief(StrEnum):
    """What is done to a PUBLISH."""

    SWALLOW = "swallow"
    """It vanishes, and is acknowledged."""
    DOUBLE = "double"
    """It comes twice; the second acknowledgement vanishes if there is one."""
    DELAY = "delay"
    """It comes later than what was sent after it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One misbehaviour while it lasts: each PUBLISH that goes to `side` suffers with `share`.

    `rng` decides which; `delay_s` is for `DELAY`. `kinds`: only topics that contain one of these,
    all of them if it is empty.
    """

    mischief: Mischief
    side: Side
    share: float
    rng: random.Random = field(repr=False, compare=False)
    delay_s: float = 0.0
    kinds: tuple[str, ...] = ()

    def hits(self, side: Side, message: Publish) -> bool:
        """Whether this message suffers."""
        if side is not self.side:
            return False
        if self.kinds and not any(kind in message.topic for kind in self.kinds):
            return False
        return self.rng.random() < self.share


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes to pass on in a direction, after so long."""

    side: Side
    data: bytes
    delay_s: float = 0.0


class Tamper:
    """The state of one connection. `rules`: what is in force now, read anew for each packet.

    `tap`: called with each PUBLISH before a rule touches it.
    """

    def __init__(
        self, rules: Callable[[], tuple[Rule, ...]], tap: Callable[[Side, Publish], None]
    ) -> None:
        self._rules = rules
        self._tap = tap
        self._v5 = False
        self._unanswered: dict[Side, set[int]] = {Side.UP: set(), Side.DOWN: set()}
        self.suffered: dict[Mischief, int] = dict.fromkeys(Mischief, 0)

    def pass_on(self, side: Side, packet: bytes) -> list[Sent]:
        """What becomes of a whole packet that goes to `side`."""
        kind = packet_type(packet)
        if kind == PacketType.CONNECT and side is Side.UP:
            self._v5 = is_v5(packet)
        if kind == PacketType.PUBACK:
            # It answers a publish of the other direction; only the first answer is wanted.
            unanswered, answered = self._unanswered[side.reverse], acknowledged_id(packet)
            if answered not in unanswered:
                return []
            unanswered.discard(answered)
        if kind == PacketType.PUBLISH:
            return self._pass_publish(side, packet)
        return [Sent(side, packet)]

    def _pass_publish(self, side: Side, packet: bytes) -> list[Sent]:
        message = parse_publish(packet, v5=self._v5)
        self._tap(side, message)
        if message.packet_id is not None:
            self._unanswered[side].add(message.packet_id)
        for rule in self._rules():
            if rule.hits(side, message):
                self.suffered[rule.mischief] += 1
                return self._harm(rule, side, packet, message)
        return [Sent(side, packet)]

    def _harm(self, rule: Rule, side: Side, packet: bytes, message: Publish) -> list[Sent]:
        match rule.mischief:
            case Mischief.SWALLOW:
                if message.packet_id is None:
                    return []
                self._unanswered[side].discard(message.packet_id)
                return [Sent(side.reverse, puback(message.packet_id))]
            case Mischief.DOUBLE:
                flag = DUPLICATE_FLAG if message.packet_id is not None else 0
                again = bytes([packet[0] | flag]) + packet[1:]
                return [Sent(side, packet), Sent(side, again)]
            case Mischief.DELAY:
                return [Sent(side, packet, rule.delay_s)]
