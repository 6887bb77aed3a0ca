"""Who is online, as `fedge device list` says it: after deaths, and after a broker's death."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from fedge.coordinator import presence
from fedge.schemas import messages
from fedge.schemas.link.protocol import Will
from fedge.schemas.messages import Presence
from tests.brokers import MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = pytest.mark.e2e

PERSISTENT = ("persistence true", "autosave_interval 1", "autosave_on_changes true")


def online(here: Fleet) -> dict[str, bool]:
    with here.store() as store:
        return {device.name: device.online for device in store.devices()}


async def becomes(here: Fleet, wanted: dict[str, bool]) -> None:
    async with asyncio.timeout(30):
        while online(here) != wanted:  # noqa: ASYNC110 -- the store tells nobody
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def mortal(here: Fleet, name: str, boot: int = 1):
    """A device that only lives: its control session, with a will."""
    death = messages.encode(Presence(boot=boot, online=False))
    broker = here.settings.broker
    will = Will(here.topics.presence(name), death)
    link = broker.link(f"{here.population}.{name}", random.Random(name), will=will)
    await link.start()
    birth = messages.encode(Presence(boot=boot, online=True))
    await link.publish(here.topics.presence(name), birth, retain=True)
    try:
        yield link
    finally:
        await link.close()


def test_a_broker_that_comes_back_with_births_of_the_dead_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "ROLL_GRACE_S", 1.0)
    broker = MosquittoBroker(
        tmp_path / "broker", settings=(*PERSISTENT, f"persistence_location {tmp_path}/broker/")
    )

    async def scenario() -> None:
        settings = {"goal": 1, "versions": 1}
        table = {"reconnect_cap_s": 1}
        async with fleet(broker.port, tmp_path, round=settings) as here:
            here.settings = here.settings.model_copy(
                update={"broker": here.settings.broker.model_copy(update=table)}
            )
            here.start_coordinator()
            broker_table = {"port": broker.port, "reconnect_cap_s": 1}
            here.start_agent("alive", tiny_examples(20, seed=1), broker=broker_table)
            await here.version(1)
            async with mortal(here, "dead"):
                await becomes(here, {"alive": True, "dead": True})
                await asyncio.sleep(2.5)  # until the broker has written its file
                # Both die in the same moment: nobody is left to publish the will.
                broker.kill()
            broker.start()
            await becomes(here, {"alive": True, "dead": False})

    with broker:
        asyncio.run(scenario())


def test_a_device_that_dies_is_offline_and_one_that_came_back_stays_online(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with fleet(mosquitto.port, tmp_path, round={"goal": 1}) as here:
            here.start_coordinator()
            await here.version(0)
            async with mortal(here, "a", boot=7) as link:
                await becomes(here, {"a": True})
                # The will of an earlier life comes late.
                late = messages.encode(Presence(boot=6, online=False))
                await link.publish(here.topics.presence("a"), late, retain=True)
                now = messages.encode(Presence(boot=7, online=True))
                async with mortal(here, "b"):
                    await becomes(here, {"a": True, "b": True})
                await link.publish(here.topics.presence("a"), now, retain=True)
                death = messages.encode(Presence(boot=1, online=False))
                await link.publish(here.topics.presence("b"), death, retain=True)
                await becomes(here, {"a": True, "b": False})

    asyncio.run(scenario())
