"""Broker, coordinator and agents may start in any order: none of them assumes another."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from tests.brokers import MOSQUITTO, MosquittoBroker
from tests.fleet import Fleet, fleet, tiny_examples

pytestmark = pytest.mark.e2e

QUICK = {"reconnect_cap_s": 1}


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.parametrize("order", [*itertools.permutations(("broker", "coordinator", "agent"))])
def test_any_start_order_works(order: tuple[str, ...], tmp_path: Path) -> None:
    broker = MosquittoBroker(tmp_path / "broker")

    def start(here: Fleet, what: str) -> None:
        match what:
            case "broker":
                broker.start()
            case "coordinator":
                here.start_coordinator()
            case "agent":
                table = {"port": broker.port, **QUICK}
                here.start_agent("a", tiny_examples(20, seed=1), broker=table)

    async def scenario() -> None:
        settings = {"goal": 1, "over_selection": 1.0, "versions": 1}
        async with fleet(broker.port, tmp_path, round=settings) as here:
            table = here.settings.broker.model_copy(update=QUICK)
            here.settings = here.settings.model_copy(update={"broker": table})
            for what in order:
                start(here, what)
                # Long enough for whoever misses somebody to have noticed.
                await asyncio.sleep(0.5)
            assert (await here.version(1)).number == 1

    try:
        asyncio.run(scenario())
    finally:
        broker.kill()
