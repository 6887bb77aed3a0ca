"""The brokers under the link contract, each with a cable that can be cut for each client.

A bench hides what differs: how a broker is started and killed, and how a client loses its network.
`queues_for_absent`, `delivers_again`, `bounds_deliveries`, `refuses_oversize` and `hears_goodbyes`
say what a broker can do at all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

from fedge.schemas.link.memory import MemoryBroker
from fedge.schemas.link.paho import LinkSettings, MqttProtocol, PahoLink
from fedge.schemas.link.protocol import Link, Will
from tests.brokers import HOST, AmqttBroker, BrokerProcess, MosquittoBroker
from tests.cable import Cable

PAYLOAD_LIMIT_BYTES = 100_000
"""What the broker of a limited bench takes, about."""


class Bench(Protocol):
    """A broker under test and the clients' networks."""

    queues_for_absent: bool
    delivers_again: bool
    bounds_deliveries: bool
    refuses_oversize: bool
    hears_goodbyes: bool

    async def link(
        self, client_id: str, *, will: Will | None = None, receive_maximum: int = 16
    ) -> Link: ...
    async def cut(self, client_id: str) -> None: ...
    async def mend(self, client_id: str) -> None: ...
    async def kill_broker(self) -> None: ...
    async def start_broker(self) -> None: ...
    async def close(self) -> None: ...


class MemoryBench:
    """The seeded broker in memory."""

    queues_for_absent = delivers_again = bounds_deliveries = refuses_oversize = True
    hears_goodbyes = True

    def __init__(self, *, limited: bool) -> None:
        extra: dict[str, Any] = {"max_payload_bytes": PAYLOAD_LIMIT_BYTES} if limited else {}
        self.broker = MemoryBroker(random.Random(1), **extra)
        self._links: list[Link] = []

    async def link(
        self, client_id: str, *, will: Will | None = None, receive_maximum: int = 16
    ) -> Link:
        link = self.broker.link(client_id, will=will, receive_maximum=receive_maximum)
        self._links.append(link)
        return link

    async def cut(self, client_id: str) -> None:
        self.broker.partition(client_id)

    async def mend(self, client_id: str) -> None:
        self.broker.heal(client_id)

    async def kill_broker(self) -> None:
        self.broker.kill()

    async def start_broker(self) -> None:
        self.broker.start()

    async def close(self) -> None:
        for link in self._links:
            await link.close()


class PahoBench:
    """A real broker, and paho."""

    def __init__(self, broker: BrokerProcess, protocol: MqttProtocol, *, limited: bool) -> None:
        self.broker = broker
        self.protocol = protocol
        self.limited = limited
        is_complete = isinstance(broker, MosquittoBroker)
        self.queues_for_absent = self.delivers_again = is_complete
        self.bounds_deliveries = self.refuses_oversize = self.hears_goodbyes = is_complete
        self._cables: dict[str, Cable] = {}
        self._links: list[Link] = []

    async def link(
        self, client_id: str, *, will: Will | None = None, receive_maximum: int = 16
    ) -> Link:
        cable = self._cables.get(client_id)
        if cable is None:
            cable = self._cables[client_id] = Cable(self.broker.port)
            await cable.mend()
        # MQTT 3.1.1 has no way to tell a client its limit: the operator has to.
        told = self.limited and self.protocol is MqttProtocol.V311
        link = PahoLink(
            LinkSettings(
                host=HOST,
                port=cable.port,
                client_id=client_id,
                protocol=self.protocol,
                will=will,
                receive_maximum=receive_maximum,
                backoff_base_s=0.05,
                backoff_cap_s=0.2,
                **({"max_packet_bytes": PAYLOAD_LIMIT_BYTES} if told else {}),
            ),
            random.Random(1),
        )
        self._links.append(link)
        return link

    async def cut(self, client_id: str) -> None:
        await self._cables[client_id].cut()

    async def mend(self, client_id: str) -> None:
        await self._cables[client_id].mend()

    async def kill_broker(self) -> None:
        self.broker.kill()

    async def start_broker(self) -> None:
        self.broker.start()

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        for cable in self._cables.values():
            await cable.cut()


def make_broker(kind: str, folder: Path, *, limited: bool) -> BrokerProcess:
    """The real broker of a bench."""
    if kind == "amqtt":
        return AmqttBroker(folder)
    settings = (f"max_packet_size {PAYLOAD_LIMIT_BYTES}",) if limited else ()
    return MosquittoBroker(folder, settings=settings)
