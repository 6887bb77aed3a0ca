"""What a device does about versions that it cannot take."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedge.edge_agent import versions as module
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.versions import Versions
from fedge.schemas.blobs import describe
from fedge.schemas.errors import ConfigError
from fedge.schemas.messages import Report, ReportKind, VersionAnnouncement


def announcement(number: int) -> VersionAnnouncement:
    blob = describe(b"blob")
    return VersionAnnouncement(
        number=number, plan=blob, weights=blob, golden=blob, model_sha256="a" * 64, model_bytes=1
    )


def test_a_coordinator_that_is_behind_is_told_so_once(monkeypatch) -> None:
    monkeypatch.setattr(module, "MOMENT_S", 0.0)
    said: list[Report] = []

    async def report(one: Report) -> None:
        said.append(one)

    async def scenario() -> None:
        anything: Any = SimpleNamespace()
        here = Versions(
            "pi-1",
            library=anything,
            downloads=anything,
            memory=anything,
            trainer=anything,
            storage=anything,
            feed=lambda _: None,
            report=report,
        )
        old, new = announcement(0), announcement(3018)
        # A broker's memory of an older version, replaced in the next moment, is nothing to tell.
        here.announced(old)
        here.announced(new)
        await here.complain(old, 3018)
        assert not said
        here.announced(old)
        await here.complain(old, 3018)
        await here.complain(old, 3018)
        assert [(one.kind, one.version) for one in said] == [(ReportKind.VERSION_IGNORED, 3018)]
        assert "--gap" in said[0].detail

    asyncio.run(scenario())


def test_a_state_folder_belongs_to_one_population(tmp_path: Path) -> None:
    memory = AgentState(tmp_path / "agent.sqlite")
    memory.bind_population("digits")
    memory.close()
    again = AgentState(tmp_path / "agent.sqlite")
    again.bind_population("digits")
    with pytest.raises(ConfigError, match="belongs to population 'digits', not 'digitz'"):
        again.bind_population("digitz")
    again.close()
