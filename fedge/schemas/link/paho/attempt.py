"""One attempt to connect: what CONNECT says, and the part of it that blocks.

DNS, TCP and the CONNECT packet run in a thread; no callback of paho is set by then, so none can
run in it. What the broker answers is `connection`'s matter.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fedge.schemas.link.paho.settings import LinkSettings, MqttProtocol

QOS = 1


def client_of(settings: LinkSettings, protocol: MqttProtocol) -> Client:
    """A client of paho for one connection, which does nothing by itself."""
    is_v5 = protocol is MqttProtocol.V5
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=settings.client_id,
        clean_session=None if is_v5 else False,
        protocol=MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311,
        # Otherwise paho answers a refused 3.1.1 with a blocking attempt at 3.1, in the callback.
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.connect_timeout = settings.connect_timeout_s
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, QOS, retain=True)
    return client


def connect(client: Client, settings: LinkSettings, protocol: MqttProtocol) -> None:
    """Blocks: DNS, TCP, CONNECT. No callback is set yet, so none can run in this thread."""
    if protocol is MqttProtocol.V5:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho's
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.receive_maximum
        properties.MaximumPacketSize = settings.largest_delivery_bytes
        client.connect(
            settings.host,
            settings.port,
            settings.keepalive_s,
            clean_start=False,
            properties=properties,
        )
    else:
        client.connect(settings.host, settings.port, settings.keepalive_s)
    connected = cast(socket.socket | None, client.socket())
    if connected is not None:
        # Small packets (PUBACK, control messages) must not wait for the peer's delayed ACK.
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def dispose_of(client: Client, attempt: asyncio.Future[None]) -> None:
    """Closes what an attempt opened that nobody waits for any more."""
    opened = client.socket()
    if not attempt.cancelled() and attempt.exception() is None and opened is not None:
        opened.close()
