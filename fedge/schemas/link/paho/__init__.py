"""The `Link` over a real broker, on top of paho: the only package that imports paho.

`PahoLink` is the session, `LinkSettings` what it must be told. Inside: `connection` drives one
paho client on one TCP connection from the event loop, `outbox` decides which publish goes next.
"""

from fedge.schemas.link.paho.link import PahoLink
from fedge.schemas.link.paho.settings import LinkSettings, MqttProtocol

__all__ = ["LinkSettings", "MqttProtocol", "PahoLink"]
