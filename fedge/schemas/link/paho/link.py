"""`PahoLink`: one MQTT session that outlives its connections (see `fedge.schemas.link.protocol`).

Keeps what belongs to the session and not to a connection: the publishes that are not acknowledged,
the filters, the events that their owner has not taken yet. One task connects, restores the
subscriptions, waits for the loss, backs off and begins again; everything else happens in the
event loop's callbacks, so a message costs no task and no thread.

What it refuses: deliveries that no subscription of this process covers. Brokers send them all the
same (amqtt: every retained message to everybody; any broker: for subscriptions which an earlier
process left in the session); they are acknowledged and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import Iterable

from fedge.schemas.errors import LinkClosed, LinkRefused, PayloadTooLarge
from fedge.schemas.link.filters import FilterSet, is_valid_filter
from fedge.schemas.link.paho.connection import (
    PACKET_TOO_LARGE,
    SESSION_TAKEN_OVER,
    UNSUPPORTED_PROTOCOL,
    Accepted,
    Answer,
    Connection,
    ConnectionFailed,
    Lost,
)
from fedge.schemas.link.paho.limits import TOPIC_ALLOWANCE_BYTES, PacketLimit
from fedge.schemas.link.paho.outbox import Outbox, Outgoing
from fedge.schemas.link.paho.settings import Backoff, LinkSettings, MqttProtocol
from fedge.schemas.link.protocol import MAX_IN_FLIGHT, Delivery, LinkDown, LinkEvent, LinkUp
from fedge.schemas.logs import EventLog

__all__ = ["TOPIC_ALLOWANCE_BYTES", "PahoLink"]

log = EventLog(__name__)

GOODBYE_LIMIT_S = 2.0
RIVAL_LOSSES = 3
"""So many short connections in a row look like two clients that take one session in turns."""
_PACKET_IDS = 65536


class PahoLink:
    """A `Link` over paho. `rng` jitters the back-off."""

    def __init__(self, settings: LinkSettings, rng: random.Random) -> None:
        self.settings = settings
        self._protocol = settings.protocol
        self._next_trial = MqttProtocol.V5
        self._hurry = asyncio.Event()
        self._backoff = Backoff(settings.backoff_base_s, settings.backoff_cap_s, rng)
        self._limit = PacketLimit(settings.max_packet_bytes)
        self._outbox = Outbox(MAX_IN_FLIGHT)
        self._filters = FilterSet()
        self._granted: set[str] = set()
        self._revoked: set[str] = set()
        self._events: deque[LinkEvent] = deque()
        self._queued_deliveries = 0
        self._early: list[Delivery] = []
        self._wake_up: asyncio.Future[None] | None = None
        self._connection: Connection | None = None
        self._connection_number = 0
        self._unacknowledged: set[int] = set()
        self._up = False
        self._paused = False
        self._closed = False
        self._failure: BaseException | None = None
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "up" if self._up else "down"
        return f"<PahoLink {self.settings.client_id} {state}>"

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection, and the subscriptions are restored."""
        return self._up

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that the broker takes under a topic of Fedge, as far as is known."""
        return self._limit.payload_bytes

    # ------------------------------------------------------------------ Link

    async def start(self) -> None:
        """Begins to connect and returns at once. Call once."""
        if self._keeper is not None or self._closed:
            raise RuntimeError("a link is started once")
        self._keeper = asyncio.create_task(
            self._keep_connected(), name=f"link {self.settings.client_id}"
        )
        self._keeper.add_done_callback(self._on_keeper_done)

    def hurry(self) -> None:
        """The broker is known to be back: a link that waits to try again tries now."""
        self._hurry.set()

    async def close(self) -> None:
        """Sends what is queued and DISCONNECT, then ends. Waiting calls raise `LinkClosed`."""
        if self._closed:
            return
        self._closed = True
        self._up = False
        for outgoing in self._outbox.close():
            if not outgoing.done.done():
                outgoing.done.set_exception(LinkClosed("the link was closed"))
        self._events.clear()
        self._wake()
        try:
            if self._connection is not None:
                await self._connection.disconnect(GOODBYE_LIMIT_S)
        finally:
            if self._connection is not None:
                self._connection.abandon()
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.wait((self._keeper,))

    async def next_event(self) -> LinkEvent:
        """The next event, in order. Raises `LinkClosed` after `close`. For one caller at a time."""
        while self._closed or not self._events:
            self._raise_if_closed()
            if self._wake_up is not None:
                raise RuntimeError("somebody else waits for the link's next event")
            self._wake_up = asyncio.get_running_loop().create_future()
            try:
                await self._wake_up
            finally:
                self._wake_up = None
        event = self._events.popleft()
        if isinstance(event, Delivery):
            self._queued_deliveries -= 1
            self._regulate()
        return event

    def ack(self, delivery: Delivery) -> None:
        """Tells the broker that it may forget this delivery. Harmless when repeated or too late."""
        number, packet_id = divmod(delivery.token, _PACKET_IDS)
        is_current = number == self._connection_number and self._connection is not None
        if is_current and packet_id in self._unacknowledged:
            self._acknowledge(packet_id)

    async def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: float | None = None
    ) -> None:
        """Publishes with QoS 1 and returns when the broker acknowledged, across reconnects.

        `expiry_s`: neither we nor the broker (MQTT 5) send it later than that. Cancelling withdraws
        a publish that still waits; one on its way may still arrive. Raises `PayloadTooLarge`,
        `LinkRefused` or `LinkClosed`.
        """
        self._raise_if_closed()
        self._limit.check(topic, payload)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        expires_s = math.inf if expiry_s is None else loop.time() + expiry_s
        outgoing = Outgoing(topic, payload, retain, done, expires_s)
        self._outbox.add(outgoing)
        self._send_waiting()
        self._regulate()
        try:
            await done
        except asyncio.CancelledError:
            self._outbox.withdraw(outgoing)
            raise
        finally:
            self._regulate()

    async def subscribe(self, *filters: str) -> None:
        """Subscribes with QoS 1 and returns when the broker granted; kept across reconnects.

        While the link is down, or if it goes down meanwhile, the filters are only noted, and
        subscribed before the next `LinkUp`. Raises `LinkRefused` (the refused filters are
        forgotten, the others kept), `LinkClosed`, or `ValueError` for what is not a filter.
        """
        self._raise_if_closed()
        for topic_filter in filters:
            self._filters.add(topic_filter)
            self._granted.discard(topic_filter)
            self._revoked.discard(topic_filter)
        if self._up and self._connection is not None:
            refused = await self._send_subscribe(self._connection, filters)
            self._raise_if_closed()
            for topic_filter, _ in refused:
                self._filters.discard(topic_filter)
            for topic_filter, answer in refused:
                what = f"the subscription to {topic_filter}"
                raise LinkRefused(what, answer.code, answer.explanation)

    async def unsubscribe(self, *filters: str) -> None:
        """Takes back a subscription, here at once and at the broker as soon as it can be told."""
        self._raise_if_closed()
        for topic_filter in filters:
            if not is_valid_filter(topic_filter):
                raise ValueError(f"not a topic filter: {topic_filter[:200]!r}")
            self._filters.discard(topic_filter)
            self._granted.discard(topic_filter)
            self._revoked.add(topic_filter)
        if self._up and self._connection is not None:
            await self._send_unsubscribe(self._connection, filters)
            self._raise_if_closed()

    # ------------------------------------------------------------------ the sink of a connection

    def on_message(self, topic: str, payload: bytes, retained: bool, packet_id: int) -> None:
        """A message came: queue it, or drop it if nothing here asked for it."""
        if packet_id:
            self._unacknowledged.add(packet_id)
        if not self._filters.covers(topic):
            if packet_id:
                self._acknowledge(packet_id)
            return
        token = self._connection_number * _PACKET_IDS + packet_id if packet_id else 0
        delivery = Delivery(topic, payload, retained, token)
        self._queued_deliveries += 1
        if self._up:
            self._emit(delivery)
        else:
            self._early.append(delivery)
        self._regulate()

    def on_published(self, packet_id: int, answer: Answer) -> None:
        """A PUBACK came: the publish is over, and the next may go."""
        outgoing = self._outbox.acknowledged(packet_id)
        if outgoing is not None and not outgoing.done.done():
            if answer.refused:
                what = f"a publish to {outgoing.topic}"
                outgoing.done.set_exception(LinkRefused(what, answer.code, answer.explanation))
            else:
                outgoing.done.set_result(None)
        self._send_waiting()

    # ------------------------------------------------------------------ connecting

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            lasted_s = 0.0
            trial = self._next_trial if self._protocol is MqttProtocol.AUTO else self._protocol
            try:
                connection = await Connection.open(self.settings, trial, self)
                self._begin(connection)
                accepted = await connection.accepted(self._answer_limit_s(trial))
                since_s = loop.time()
                await self._go_up(connection, trial, accepted)
                lost = await asyncio.shield(connection.lost)
                lasted_s = loop.time() - since_s
            except ConnectionFailed as error:
                lost = Lost(error.reason, error.code)
                if self._tries_another_protocol(trial, error):
                    self._drop_connection(lost)
                    continue
            was_idle = not self._outbox.waits_for_answers
            self._drop_connection(lost)
            if self._closed:
                return
            if lost.code == SESSION_TAKEN_OVER:
                self._backoff.slow_down()
            delay_s = self._backoff.next_delay_s(lasted_s)
            reason = lost.reason
            if lasted_s and lost.closed_by_peer and self._backoff.attempts >= RIVAL_LOSSES:
                reason += f"; does another client use the id {self.settings.client_id!r}"
                reason += "?" if was_idle else ", or is a packet above the broker's limit?"
            log.warning(
                "link_down",
                client_id=self.settings.client_id,
                reason=reason,
                retry_in_s=round(delay_s, 2),
            )
            self._emit_down(reason)
            await self._wait_to_try_again(delay_s, lasted_s, lost)

    async def _wait_to_try_again(self, delay_s: float, lasted_s: float, lost: Lost) -> None:
        if lost.code == SESSION_TAKEN_OVER or (lasted_s and lost.closed_by_peer):
            # Perhaps a rival has the session: to come back sooner would only be a fight.
            await asyncio.sleep(delay_s)
            return
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._hurry.wait()

    def _answer_limit_s(self, trial: MqttProtocol) -> float:
        undecided = self._protocol is MqttProtocol.AUTO and trial is MqttProtocol.V5
        limit_s = self.settings.connect_timeout_s
        return min(limit_s, self.settings.auto_answer_s) if undecided else limit_s

    def _tries_another_protocol(self, trial: MqttProtocol, error: ConnectionFailed) -> bool:
        """Whether a failed attempt may be about the protocol; the next attempt uses the other one.

        A broker that knows 3.1.1 only answers code 1, or says nothing. Returns True if the other
        protocol is worth an attempt at once.
        """
        if self.settings.protocol is not MqttProtocol.AUTO:
            return False
        if error.code == UNSUPPORTED_PROTOCOL:
            # Also if it worked before: the broker was replaced.
            self._protocol = MqttProtocol.AUTO
        elif not error.silent or self._protocol is not MqttProtocol.AUTO:
            return False
        was_v5 = trial is MqttProtocol.V5
        self._next_trial = MqttProtocol.V311 if was_v5 else MqttProtocol.V5
        return was_v5

    def _begin(self, connection: Connection) -> None:
        self._connection = connection
        self._connection_number += 1
        self._unacknowledged.clear()
        self._paused = False

    async def _go_up(
        self, connection: Connection, protocol: MqttProtocol, accepted: Accepted
    ) -> None:
        self._protocol = protocol
        self._limit.connected(accepted.max_packet_bytes, session_present=accepted.session_present)
        # Also where the broker has our session: one that was killed may come back with the session
        # as it was saved, before the last subscriptions. To say them again harms nobody.
        self._granted.clear()
        if not accepted.session_present:
            self._revoked.clear()
        await self._restore_subscriptions(connection)
        if connection.lost.done() or self._closed:
            return
        self._up = True
        log.info(
            "link_up",
            client_id=self.settings.client_id,
            protocol=protocol.value,
            session_present=accepted.session_present,
        )
        self._emit(LinkUp(accepted.session_present))
        for delivery in self._early:
            self._emit(delivery)
        self._early.clear()
        self._outbox.connected(accepted.receive_maximum)
        self._send_waiting()

    async def _restore_subscriptions(self, connection: Connection) -> None:
        if self._revoked:
            await self._send_unsubscribe(connection, tuple(self._revoked))
        tried: set[str] = set()
        # Filters may be added while others are on their way, hence the loop.
        while missing := [f for f in self._filters if f not in self._granted and f not in tried]:
            tried.update(missing)
            for topic_filter, answer in await self._send_subscribe(connection, missing):
                log.error(
                    "subscription_refused",
                    client_id=self.settings.client_id,
                    filter=topic_filter,
                    code=answer.code,
                    reason=answer.explanation,
                )

    def _drop_connection(self, lost: Lost) -> None:
        self._up = False
        # What came before LinkUp belongs to the session: the owner gets it all the same.
        for delivery in self._early:
            self._emit(delivery)
        self._early.clear()
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None
        self._unacknowledged.clear()
        was_idle = not self._outbox.waits_for_answers
        given_up = self._outbox.lost(closed_by_peer=lost.closed_by_peer)
        if given_up is not None:
            self._note_refused(given_up, lost)
        elif was_idle:
            self._limit.ended_idle()

    def _note_refused(self, given_up: Outgoing, lost: Lost) -> None:
        size_bytes = self._limit.refused(given_up.topic, given_up.payload)
        why = "it closes the connection whenever this is sent"
        log.error(
            "broker_limit",
            client_id=self.settings.client_id,
            packet_bytes=size_bytes,
            reason=why,
        )
        code = lost.code if lost.code == PACKET_TOO_LARGE else None
        given_up.done.set_exception(LinkRefused(f"a publish to {given_up.topic}", code, why))

    # ------------------------------------------------------------------ sending

    def _send_waiting(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._up and self._connection is not None:
            outgoing = self._outbox.next_to_send(now_s)
            if outgoing is None:
                return
            try:
                self._limit.check(outgoing.topic, outgoing.payload)
            except PayloadTooLarge as error:
                outgoing.done.set_exception(error)
                continue
            packet_id = self._connection.publish(
                outgoing.topic, outgoing.payload, outgoing.retain, outgoing.expires_s - now_s
            )
            if packet_id is None:
                return
            self._outbox.sent(packet_id)

    async def _send_subscribe(
        self, connection: Connection, filters: Iterable[str]
    ) -> list[tuple[str, Answer]]:
        """Subscribes in packets of a few filters each and returns the refused ones."""
        batches = [(batch, connection.subscribe(batch)) for batch in self._batches(filters)]
        self._regulate()
        refused: list[tuple[str, Answer]] = []
        for batch, answers in batches:
            # Empty if the connection was lost first: then the filters stay noted.
            for topic_filter, answer in zip(batch, await answers, strict=False):
                if answer.refused:
                    refused.append((topic_filter, answer))
                elif topic_filter in self._filters:
                    self._granted.add(topic_filter)
        return refused

    async def _send_unsubscribe(self, connection: Connection, filters: Iterable[str]) -> None:
        batches = [(batch, connection.unsubscribe(batch)) for batch in self._batches(filters)]
        self._regulate()
        for batch, answers in batches:
            await answers
            if not connection.lost.done():
                self._revoked.difference_update(batch)

    def _batches(self, filters: Iterable[str]) -> list[list[str]]:
        listed, size = list(filters), self.settings.filters_per_subscribe
        return [listed[start : start + size] for start in range(0, len(listed), size)]

    def _acknowledge(self, packet_id: int) -> None:
        self._unacknowledged.discard(packet_id)
        if self._connection is not None:
            self._connection.ack(packet_id)

    # ------------------------------------------------------------------ events

    def _emit(self, event: LinkEvent) -> None:
        self._events.append(event)
        self._wake()

    def _emit_down(self, reason: str) -> None:
        # A long outage is one event with the newest reason, however slow the owner is.
        if self._events and isinstance(self._events[-1], LinkDown):
            self._events.pop()
        self._emit(LinkDown(reason))

    def _wake(self) -> None:
        if self._wake_up is not None and not self._wake_up.done():
            self._wake_up.set_result(None)

    def _regulate(self) -> None:
        """Stops reading while the owner is further behind than the broker should allow.

        Brokers that honour Receive Maximum never get here. While an answer of the broker is
        awaited, reading goes on: the owner may be waiting for just that before it takes events.
        """
        connection = self._connection
        if connection is None:
            return
        too_many = self._queued_deliveries > self.settings.receive_maximum
        pause = too_many and self._up and not self._outbox and not connection.awaits_answers
        if pause != self._paused:
            self._paused = pause
            if pause:
                connection.pause_reading()
            else:
                connection.resume_reading()

    def _on_keeper_done(self, keeper: asyncio.Task[None]) -> None:
        # It ends by itself only through a defect: then the link is closed, loudly.
        if not keeper.cancelled() and keeper.exception() is not None:
            log.error("link_failed", client_id=self.settings.client_id)
            self._failure = keeper.exception()
            self._closed = True
            for outgoing in self._outbox.close():
                if not outgoing.done.done():
                    outgoing.done.set_exception(LinkClosed("the link failed"))
            self._wake()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise LinkClosed("the link was closed") from self._failure
