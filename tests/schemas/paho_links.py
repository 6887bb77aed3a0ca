"""Links of paho to brokers on 127.0.0.1, with a back-off that tests can wait for."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from fedge.schemas.link.paho import LinkSettings, MqttProtocol, PahoLink
from tests.brokers import HOST, MOSQUITTO

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
LIMIT_S = 20.0
QUIET_S = 0.2


def settings(port: int, client_id: str = "client", **changes) -> LinkSettings:
    values = {"protocol": MqttProtocol.V5, "backoff_base_s": 0.02, "backoff_cap_s": 0.05}
    return LinkSettings(HOST, port, client_id, **(values | changes))


@contextlib.asynccontextmanager
async def linked(port: int, *filters: str, **changes) -> AsyncIterator[PahoLink]:
    link = PahoLink(settings(port, **changes), random.Random(1))
    await link.subscribe(*filters)
    await link.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            yield link
    finally:
        await link.close()


async def next_of(link: PahoLink, kind: type):
    while True:
        event = await link.next_event()
        if isinstance(event, kind):
            return event


async def keep_quiet() -> None:
    """Long enough for something wrong to happen on this machine."""
    await asyncio.sleep(QUIET_S)
