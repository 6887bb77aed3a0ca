"""The word count desk over a real store: what is announced, and when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedge.coordinator.store import Store
from fedge.coordinator.surroundings import Surroundings
from fedge.coordinator.word_count_desk import WordCountDesk
from fedge.coordinator.workers import Workers
from fedge.schemas.messages import WordCountAnnouncement


def test_over_how_long_answers_are_spread_is_said_when_all_devices_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, after a restore, nobody is known: a whole fleet would answer within a second."""
    monkeypatch.setattr("fedge.coordinator.word_count_desk.KNOWN_SOON_S", 0.01)
    fleet = SimpleNamespace(online=frozenset[str](), all_known=False)
    announced: list[WordCountAnnouncement] = []

    async def announce(message: WordCountAnnouncement) -> None:
        announced.append(message)

    async def run(store: Store) -> None:
        workers = Workers()
        desk = WordCountDesk(
            store=store,
            publisher=SimpleNamespace(announce=announce),
            journal=SimpleNamespace(),
            workers=workers,
            around=Surroundings(
                tell=lambda *_: None,
                start=lambda *_: None,
                publish=lambda: None,
                publish_again=lambda: None,
                wake=lambda: None,
                online=lambda: fleet.online,
                all_known=lambda: fleet.all_known,
                clock=lambda: 0.0,
                wall_clock=lambda: 1000.0,
            ),
            answers_per_s=10.0,
            is_up=lambda: True,
        )
        try:
            looking = asyncio.create_task(desk.look())
            for _ in range(10):
                await asyncio.sleep(0.02)
                assert announced == []
                fleet.online = frozenset(f"d{number}" for number in range(500))
            fleet.all_known = True
            await looking
        finally:
            workers.close()

    with Store.open(tmp_path / "state", create=True) as store:
        store.request_word_count(
            epsilon=4.0, least_typed=3, new_only=False, deadline_s=60.0, at=1.0
        )
        asyncio.run(run(store))
    assert [one.spread_s for one in announced] == [50.0]
