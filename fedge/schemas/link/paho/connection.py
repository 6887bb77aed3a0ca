"""One MQTT connection: one paho client on one TCP connection, driven by the event loop.

A new client for each connection: what paho would keep from the last one (its queue, its packet
identifiers, its wish to reconnect by itself) is exactly what the link keeps better. Only the
blocking part, DNS, TCP, and the CONNECT packet, runs in a thread; every callback of paho runs on
the loop, does no more than tell the sink or resolve a future, and an exception in one ends this
connection and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedge.schemas.link.paho.answers import AnswerWatch
from fedge.schemas.link.paho.attempt import QOS, client_of, connect, dispose_of
from fedge.schemas.link.paho.settings import LinkSettings, MqttProtocol
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

UNSUPPORTED_PROTOCOL = 0x84
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95
_UNLIMITED_RECEIVE_MAXIMUM = 65535
_KEEPALIVE_SLACK_S = 0.05
_FAILURE = 0x80
"""Reason codes from here on are refusals (MQTT 5, section 2.4)."""


_CLOSED = "the connection was closed by the broker or the network"
"""Mosquitto 2.0 says no more than that when a session is taken over."""
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the broker's CONNACK says."""

    session_present: bool
    receive_maximum: int
    max_packet_bytes: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a connection ended. `code`: the broker's reason code, if it gave one.

    `closed_by_peer`: the other side ended it, in contrast to silence until our deadline.
    """

    reason: str
    code: int | None = None
    closed_by_peer: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """One reason code of a SUBACK, UNSUBACK or PUBACK, with its name."""

    code: int
    explanation: str

    @property
    def refused(self) -> bool:
        """Whether it is a refusal."""
        return self.code >= _FAILURE


class ConnectionFailed(Exception):  # noqa: N818 -- the outcome of an attempt
    """An attempt that did not end in a positive CONNACK."""

    def __init__(self, reason: str, code: int | None = None, *, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.silent = silent
        """The broker took the TCP connection and then answered nothing."""


class Sink(Protocol):
    """Who hears of what arrives. Called on the loop; must not block."""

    def on_message(self, topic: str, payload: bytes, retained: bool, packet_id: int) -> None:
        """A message; `packet_id` is 0 if there is nothing to acknowledge."""
        ...

    def on_published(self, packet_id: int, answer: Answer) -> None:
        """The answer to a publish."""
        ...


class Connection:
    """A connection that the broker accepted, until `lost` resolves."""

    def __init__(
        self, client: Client, sink: Sink, settings: LinkSettings, protocol: MqttProtocol
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._sink = sink
        self._is_v5 = protocol is MqttProtocol.V5
        self._largest_delivery_bytes = settings.largest_delivery_bytes
        self._keepalive_s = settings.keepalive_s
        # Without websockets it is a plain socket.
        self._socket = cast(socket.socket, client.socket())
        self._fileno = self._socket.fileno()
        self.lost: asyncio.Future[Lost] = self._loop.create_future()
        self._connack: asyncio.Future[Accepted] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[list[Answer]]] = {}
        self._reading = False
        self._writer_added = False
        self._write_soon: asyncio.Handle | None = None
        self._ended = False
        self._driving = False
        self._lost_while_driving = False
        self._last_read_s = self._last_write_s = self._loop.time()
        self._keepalive_timer: asyncio.TimerHandle | None = None
        self._watch = AnswerWatch(self._loop, settings.answer_limit_s, self._on_late_answer)

    @classmethod
    async def open(cls, settings: LinkSettings, protocol: MqttProtocol, sink: Sink) -> Connection:
        """A connection on which CONNECT was sent. Raises `ConnectionFailed`."""
        client = client_of(settings, protocol)
        loop = asyncio.get_running_loop()
        attempt = loop.run_in_executor(None, connect, client, settings, protocol)
        try:
            await asyncio.shield(attempt)
        except OSError as error:
            raise ConnectionFailed(f"{settings.host}:{settings.port}: {error}") from error
        except asyncio.CancelledError:
            # The thread cannot be stopped; its socket is closed as soon as it has one.
            attempt.add_done_callback(lambda done: dispose_of(client, done))
            raise
        if client.socket() is None:
            raise ConnectionFailed("the connection was lost while CONNECT was sent", silent=True)
        connection = cls(client, sink, settings, protocol)
        connection._attach()
        return connection

    async def accepted(self, timeout_s: float) -> Accepted:
        """The broker's positive CONNACK. Raises `ConnectionFailed`; the connection is over then."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait((self._connack, self.lost), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            self.abandon()
            raise ConnectionFailed(f"no CONNACK within {timeout_s:g} s", silent=True) from None
        if self._connack.done():
            return self._connack.result()
        lost = self.lost.result()
        raise ConnectionFailed(lost.reason, lost.code, silent=lost.code is None)

    # ------------------------------------------------------------------ what the link asks for

    @property
    def awaits_answers(self) -> bool:
        """Whether a SUBSCRIBE or UNSUBSCRIBE is unanswered."""
        return bool(self._answers)

    def publish(
        self, topic: str, payload: bytes, retain: bool, expiry_s: float = math.inf
    ) -> int | None:
        """Hands a publish over and returns its packet identifier; None if the socket is gone.

        `expiry_s`: how long the broker may keep it (MQTT 5; before, for ever).
        """
        properties = None
        if self._is_v5 and math.isfinite(expiry_s):
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call] # paho's
            properties.MessageExpiryInterval = min(max(1, math.ceil(expiry_s)), 2**32 - 1)
        while True:
            info = self._client.publish(topic, payload, QOS, retain, properties)
            # After 65,535 packets identifiers repeat; one that is still in use is skipped.
            if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                continue
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return None
            self._watch.asked()
            return info.mid

    def subscribe(self, filters: list[str]) -> asyncio.Future[list[Answer]]:
        """Sends one SUBSCRIBE; the future holds one answer a filter, none if we lose first."""
        return self._expect(self._client.subscribe([(each, QOS) for each in filters])[1])

    def unsubscribe(self, filters: list[str]) -> asyncio.Future[list[Answer]]:
        """Sends one UNSUBSCRIBE; the future resolves with its answer, or empty if we lose first."""
        return self._expect(self._client.unsubscribe(filters)[1])

    def ack(self, packet_id: int) -> None:
        """Queues a PUBACK."""
        self._client.ack(packet_id, QOS)

    async def disconnect(self, timeout_s: float) -> None:
        """Sends what is queued and DISCONNECT; gives up after `timeout_s`."""
        if not self._ended:
            self._client.disconnect()
            await asyncio.wait((self.lost,), timeout=timeout_s)
        self.abandon()

    def abandon(self) -> None:
        """Closes the socket without a goodbye. Harmless when repeated."""
        self._end(Lost("abandoned by this side", closed_by_peer=False))

    def pause_reading(self) -> None:
        """Leaves what comes in the kernel's buffers: TCP slows the broker down."""
        if self._reading and not self._ended:
            self._reading = False
            self._loop.remove_reader(self._fileno)

    def resume_reading(self) -> None:
        """The inverse of `pause_reading`."""
        if not self._reading and not self._ended:
            self._reading = True
            self._loop.add_reader(self._fileno, self._read)

    # ------------------------------------------------------------------ the event loop's side

    def _attach(self) -> None:
        client = self._client
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        client.on_socket_close = self._on_socket_close
        self._set_keepalive_timer()
        self.resume_reading()
        if client.want_write():
            self._add_writer()

    def _read(self) -> None:
        self._last_read_s = self._loop.time()
        self._drive(self._client.loop_read)
        if not self._ended:
            _acknowledge_at_once(self._socket)
            self._refuse_what_is_too_large()

    def _refuse_what_is_too_large(self) -> None:
        # paho would collect any packet to its end. With MQTT 5 the broker was told better.
        coming_bytes = self._client._in_packet["remaining_length"]
        if self._is_v5 and coming_bytes > self._largest_delivery_bytes:
            limit = f"it was told to send at most {self._largest_delivery_bytes}"
            self._end(Lost(f"the broker sends a packet of {coming_bytes} bytes; {limit}"))

    def _write(self) -> None:
        self._write_soon = None
        self._last_write_s = self._loop.time()
        self._drive(self._client.loop_write)
        if not self._ended and self._client.want_write():
            self._add_writer()

    def _drive(self, step: Callable[[], MQTTErrorCode]) -> None:
        if self._ended:
            return
        self._driving = True
        try:
            result = step()
        except Exception as error:  # whatever a packet made paho or a callback do
            log.exception("link_callback_failed")
            self._end(Lost(f"a packet could not be handled: {error!r}"))
            return
        finally:
            self._driving = False
        if self._lost_while_driving:
            not_mqtt = result == MQTTErrorCode.MQTT_ERR_PROTOCOL
            self._end(Lost("the broker sent what is not MQTT" if not_mqtt else _CLOSED))

    def _add_writer(self) -> None:
        if not self._writer_added:
            self._writer_added = True
            self._loop.add_writer(self._fileno, self._write)

    def _on_register_write(self, _client: Client, _userdata: object, _sock: Any) -> None:
        # The socket can nearly always be written: try first, and ask the selector only if it fills.
        if self._write_soon is None and not self._ended:
            self._write_soon = self._loop.call_soon(self._write)

    def _on_unregister_write(self, _client: Client, _userdata: object, _sock: Any) -> None:
        if self._writer_added:
            self._writer_added = False
            self._loop.remove_writer(self._fileno)

    def _on_socket_close(self, _client: Client, _userdata: object, _sock: Any) -> None:
        self._forget_socket()

    @property
    def _keepalive_now_s(self) -> int:
        # A broker that wants none (0) does not get to disarm the timer: only then paho pings not.
        return self._client.keepalive or self._keepalive_s

    def _set_keepalive_timer(self) -> None:
        idle_since_s = min(self._last_read_s, self._last_write_s)
        due_s = idle_since_s + self._keepalive_now_s + _KEEPALIVE_SLACK_S
        self._keepalive_timer = self._loop.call_at(due_s, self._on_keepalive_due)

    def _on_keepalive_due(self) -> None:
        now = self._loop.time()
        if min(self._last_read_s, self._last_write_s) + self._keepalive_now_s <= now:
            self._drive(self._client.loop_misc)
            self._last_read_s = self._last_write_s = now
        if not self._ended:
            self._set_keepalive_timer()

    def _on_late_answer(self) -> None:
        reason = "the broker answers no publish and no subscription any more"
        self._end(Lost(reason, closed_by_peer=False))

    # ------------------------------------------------------------------ paho's callbacks

    def _on_connect(
        self,
        _client: Client,
        _userdata: object,
        flags: ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._end(Lost(f"the broker refused the connection: {code}", code.value))
            return
        # paho sets an attribute for each property that was in the packet, and no others.
        said = vars(properties) if properties is not None else {}
        if self._connack.done():
            self._end(Lost("the broker broke the protocol: CONNACK for a second time"))
            return
        self._connack.set_result(
            Accepted(
                session_present=bool(flags.session_present),
                receive_maximum=said.get("ReceiveMaximum", _UNLIMITED_RECEIVE_MAXIMUM),
                max_packet_bytes=said.get("MaximumPacketSize", 2**32),
            )
        )

    def _on_disconnect(
        self,
        _client: Client,
        _userdata: object,
        flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._end(Lost(f"the broker disconnected us: {code}", code.value))
        elif code.getName() == "Keep alive timeout":
            self._end(Lost("the broker was silent past the keep-alive", closed_by_peer=False))
        elif self._driving:
            # paho tells no more here, but what it returns from the step does.
            self._lost_while_driving = True
        else:
            self._end(Lost(_CLOSED))

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        packet_id = message.mid if message.qos == QOS else 0
        if message.qos > QOS:
            # Nobody subscribes with it. The broker would wait for the end of the exchange for ever.
            self._client.ack(message.mid, message.qos)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("message_dropped", reason="topic_not_utf8")
            if packet_id:
                # Left unacknowledged, it would come again for ever.
                self.ack(packet_id)
            return
        # paho unpacks packets into bytes; its annotation also covers what one publishes.
        payload = cast(bytes, message.payload)
        self._sink.on_message(topic, payload, message.retain, packet_id)

    def _on_publish(
        self,
        _client: Client,
        _userdata: object,
        packet_id: int,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._watch.answered()
        self._sink.on_published(packet_id, _answer_of(code))

    def _on_subscribe(
        self,
        _client: Client,
        _userdata: object,
        packet_id: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        self._resolve(packet_id, [_answer_of(code) for code in codes])

    _on_unsubscribe = _on_subscribe

    # ------------------------------------------------------------------ the end

    def _expect(self, packet_id: int | None) -> asyncio.Future[list[Answer]]:
        answer: asyncio.Future[list[Answer]] = self._loop.create_future()
        if packet_id is None or self._ended:
            answer.set_result([])
        else:
            self._watch.asked()
            self._answers[packet_id] = answer
        return answer

    def _resolve(self, packet_id: int, answers: list[Answer]) -> None:
        waiting = self._answers.pop(packet_id, None)
        if waiting is not None:
            self._watch.answered()
            if not waiting.done():
                waiting.set_result(answers)

    def _end(self, lost: Lost) -> None:
        if self._ended:
            return
        self._forget_socket()
        self._ended = True
        for packet_id in list(self._answers):
            self._resolve(packet_id, [])
        if self._keepalive_timer is not None:
            self._keepalive_timer.cancel()
        self._watch.stop()
        if self._write_soon is not None:
            self._write_soon.cancel()
        self._socket.close()
        self.lost.set_result(lost)

    def _forget_socket(self) -> None:
        self.pause_reading()
        if self._writer_added:
            self._writer_added = False
            self._loop.remove_writer(self._fileno)


def _answer_of(code: ReasonCode) -> Answer:
    return Answer(code.value, code.getName())


def _acknowledge_at_once(connected: socket.socket) -> None:
    """Has the kernel acknowledge what was read now, not within 40 ms (Linux; else nothing).

    Brokers with default settings hold a small packet back until the last one is acknowledged
    (Nagle's algorithm; mosquitto: `set_tcp_nodelay false`), and a delayed acknowledgement makes
    every hop of a round wait for it. The kernel forgets the wish, so it is said at each reading.
    """
    if _QUICKACK is not None:
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
