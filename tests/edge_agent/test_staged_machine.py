"""In stages the newest version is what a device trains from, and nothing that it puts into use."""

from __future__ import annotations

from fedge.edge_agent import machine
from fedge.edge_agent.commands import Activate, Fetch
from fedge.edge_agent.events import Activated, Fetched, VersionSeen
from fedge.schemas import messages
from tests.edge_agent.announcements import version


def test_a_staged_version_is_fetched_and_not_put_into_use() -> None:
    staged = version(3).model_copy(update={"staged": True})
    state, commands = machine.step(machine.Agent(), VersionSeen(staged))
    assert commands == (Fetch(staged),)
    state, commands = machine.step(state, Fetched(3))
    assert list(commands) == []
    assert state.held == 3
    # Rollouts put another one into use.
    state, _ = machine.step(state, Activated(2))
    state, commands = machine.step(state, VersionSeen(staged))
    assert list(commands) == []

    # The fleet goes back to serving each newest version.
    state, commands = machine.step(state, VersionSeen(version(3)))
    assert [type(c) for c in commands] == [Activate]
    state, _ = machine.step(state, Activated(3))
    _, commands = machine.step(state, VersionSeen(staged))
    assert list(commands) == []


def test_the_newest_version_that_is_not_staged_is_put_into_use_as_before() -> None:
    state, _ = machine.step(machine.Agent(), VersionSeen(version(3)))
    _, commands = machine.step(state, Fetched(3))
    assert [type(c) for c in commands] == [Activate]


def test_neither_the_stable_version_nor_a_candidate_is_ever_taken_for_the_newest_one() -> None:
    """By whoever asks for a `VersionAnnouncement`: it would be put into use without a trial."""
    for kind in (messages.StableAnnouncement, messages.CandidateAnnouncement):
        assert not issubclass(kind, messages.VersionAnnouncement)
        assert issubclass(kind, messages.PublishedVersion)
