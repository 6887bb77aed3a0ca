"""A whole agent on a disk that fills up: nothing ends it, and nothing is lost or done twice.

A real broker, a real training process, a real small disk; the coordinator is played by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedge.edge_agent import offers
from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.trainer.process import TrainerLimits, TrainerProcess
from fedge.schemas.errors import StoreUnavailable
from fedge.schemas.ids import sha256
from fedge.schemas.messages import (
    Checkin,
    Offer,
    Presence,
    ReceiptStatus,
    Report,
    ReportKind,
    Retry,
    RollCall,
    RoundPhase,
)
from tests.brokers import MosquittoBroker
from tests.edge_agent.scripted_coordinator import ScriptedCoordinator, scripted_coordinator
from tests.edge_agent.small_disks import SmallDisk, small_disk

pytestmark = pytest.mark.e2e


class Running:
    """An agent on this loop, its training process and its log."""

    def __init__(self, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
        self.trainer = TrainerProcess(TrainerLimits(nice=0))
        self.agent = EdgeAgent(settings, self.trainer, random.Random(1))
        # Ten times in a second instead of once: the disk is empty again soon.
        self.agent._storage._first_retry_s = 0.1
        self.task = asyncio.create_task(self.agent.run(), name="agent")
        self._caplog = caplog

    def events(self, name: str) -> list[dict[str, object]]:
        return [
            record.fedge_fields for record in self._caplog.records if record.getMessage() == name
        ]

    async def logged(self, name: str) -> None:
        """Returns when the agent has logged such an event."""
        async with asyncio.timeout(60):
            while not self.events(name):  # noqa: ASYNC110 -- a log offers nothing to wait on
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.trainer.close()


@contextlib.asynccontextmanager
async def running(
    here: ScriptedCoordinator, caplog: pytest.LogCaptureFixture, **changes: object
) -> AsyncIterator[Running]:
    caplog.set_level("INFO")
    made = Running(here.settings(**changes), caplog)
    try:
        yield made
        assert not made.task.done(), "the agent ended by itself"
    finally:
        await made.stop()


async def trained(here: ScriptedCoordinator, number: int = 1, base: int = 0) -> Offer:
    """The offer of a device that has just been assigned."""
    await here.announce_round(number, base)
    await here.receive(Checkin, round=number)
    await here.announce_round(number, base, RoundPhase.TRAINING)
    await here.tell(here.assignment(number, base))
    return await here.receive(Offer, round=number)


def fill_the_log(memory: AgentState) -> None:
    """Writes until SQLite's log needs the next page of the disk."""
    for count in range(10_000):
        try:
            memory.keep_failures(count)
        except StoreUnavailable:
            return
    raise AssertionError("the disk is not full")


def small(folder: Path) -> contextlib.AbstractContextManager[SmallDisk]:
    return small_disk(folder / "disk", 1024 * 1024)


def test_a_version_that_meets_a_full_disk_is_fetched_when_there_is_room(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario(disk: SmallDisk) -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog, state_dir=disk.folder) as agent,
        ):
            await agent.logged("examples_counted")
            disk.fill()
            await here.publish_version(0)
            await here.announce_round(1, 0, RoundPhase.TRAINING)
            await agent.logged("storage_unavailable")
            # Nobody waits for this device: what it is asked for now, it refuses with the reason.
            await here.tell(here.assignment(1, 0))
            failed = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
            assert "No space left" in failed.detail
            await here.announce_round(2, 0)
            await here.listen(1)
            assert here.heard(Checkin, round=2) == []
            disk.empty()
            await here.receive(Checkin, round=2)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
            assert len(agent.events("storage_unavailable")) == 1
            assert len(agent.events("storage_available")) == 1

    with small(tmp_path) as disk:
        asyncio.run(scenario(disk))


def test_a_receipt_that_cannot_be_written_down_is_asked_for_again(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(offers, "OFFER_AGAIN_S", 0.5)

    async def scenario(disk: SmallDisk) -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog, state_dir=disk.folder) as agent,
        ):
            await here.publish_version(0)
            offer = await trained(here)
            assert sha256(await here.take_upload(offer)) == offer.update.sha256
            disk.fill()
            fill_the_log(agent.agent._memory)
            await here.send_receipt(offer)
            await agent.logged("storage_unavailable")
            assert agent.agent._outbox.rounds == {1}
            again = await here.receive(Offer, round=1, update=offer.update)
            disk.empty()
            await here.send_receipt(again)
            await agent.logged("storage_available")
            assert agent.agent._outbox.rounds == frozenset()
            assert [(p.round, p.status) for p in agent.agent._memory.ledger()] == [(1, "accepted")]
            assert not list((disk.folder / "outbox").iterdir())
            assert [event["round"] for event in agent.events("trained")] == [1]

    with small(tmp_path) as disk:
        asyncio.run(scenario(disk))


def test_a_training_without_room_for_its_result_is_said_to_have_failed_and_the_device_rests(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario(disk: SmallDisk) -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog, state_dir=disk.folder) as agent,
        ):
            await here.publish_version(0)
            await here.receive(Report, kind=ReportKind.ACTIVATED)
            await here.announce_round(1, 0)
            await here.receive(Checkin, round=1)
            disk.fill()
            fill_the_log(agent.agent._memory)
            await here.tell(here.assignment(1, 0))
            failed = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
            assert "No space left" in failed.detail
            await here.announce_round(2, 0)
            disk.empty()
            await here.receive(Checkin, round=2)  # after the rest
            await here.tell(here.assignment(2, 0))
            offer = await here.receive(Offer, round=2)
            assert sha256(await here.take_upload(offer)) == offer.update.sha256

    with small(tmp_path) as disk:
        asyncio.run(scenario(disk))


def test_a_model_that_meets_a_full_disk_is_put_into_use_when_there_is_room(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario(disk: SmallDisk) -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog, state_dir=disk.folder) as agent,
        ):
            await here.publish_version(0)
            await agent.logged("version_fetched")
            disk.fill()
            await agent.logged("storage_unavailable")
            assert agent.events("storage_unavailable")[0]["what"] == "model"
            disk.empty()
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
            assert here.heard(Report, kind=ReportKind.ACTIVATION_FAILED) == []

    with small(tmp_path) as disk:
        asyncio.run(scenario(disk))


@pytest.mark.parametrize("kind", ["full", "read-only", "a file"])
def test_an_agent_that_cannot_use_its_disk_ends_with_a_sentence_and_status_1(
    tmp_path: Path, kind: str
) -> None:
    with contextlib.ExitStack() as stack:
        state_dir = tmp_path / "disk"
        if kind == "a file":
            state_dir.write_bytes(b"")
        else:
            options = ("ro",) if kind == "read-only" else ()
            disk = stack.enter_context(small_disk(state_dir, 64 * 1024, *options))
            if kind == "full":
                disk.fill()
        (tmp_path / "agent.toml").write_text(
            f'population = "p"\ndevice = "d"\nstate_dir = "{state_dir}"\n'
        )
        done = subprocess.run(
            [sys.executable, "-m", "fedge.edge_agent", "run", "--config",
             str(tmp_path / "agent.toml")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(state_dir) in line


def test_a_version_above_the_cache_limit_is_refused_once_and_the_one_in_use_stays(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            plan = here.plan
            shared_bytes = sum(
                map(len, (plan.manifest.encode(), plan.train, plan.infer, plan.golden))
            )
            first = await here.publish_version(0)
            own_bytes = first.weights.size_bytes + first.golden.size_bytes
            # Room for one version's own blobs, and not for another's beside them.
            limit_bytes = shared_bytes + 2 * own_bytes - 1
            storage = {"cache_limit_bytes": limit_bytes}
            async with running(here, caplog, storage=storage) as agent:
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
                second = await here.publish_version(1)
                refused = await here.receive(Report, kind=ReportKind.ACTIVATION_FAILED, version=1)
                assert f"cache_limit_bytes is {limit_bytes}" in refused.detail
                assert f"need {limit_bytes + 1} bytes" in refused.detail
                # The same version again: nothing is tried. A round that starts from it: refused.
                await here.announce(second)
                await here.announce_round(1, 1)
                await here.tell(here.assignment(1, 1))
                failed = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
                assert "cache_limit_bytes" in failed.detail
                assert here.heard(Checkin) == []
                assert len(agent.events("version_refused")) == 1
                assert agent.agent._versions.held.number == first.number
                # Another version is another matter, even if it does not fit either.
                await here.publish_version(2)
                await here.receive(Report, kind=ReportKind.ACTIVATION_FAILED, version=2)
                folder = tmp_path / "state" / "blobs"
                used = sum(path.stat().st_size for path in folder.iterdir())
                assert used <= limit_bytes

    asyncio.run(scenario())


def test_an_update_whose_file_is_gone_is_said_to_be_lost(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(offers, "OFFER_AGAIN_S", 0.5)

    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog) as agent,
        ):
            await here.publish_version(0)
            offer = await trained(here)
            (tmp_path / "state" / "outbox" / "1.safetensors").unlink()
            lost = await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=offer.round)
            assert "lost" in lost.detail
            await here.listen(2)
            assert here.heard(Offer) == []
            assert agent.agent._outbox.rounds == frozenset()

    asyncio.run(scenario())


def test_the_rest_after_failures_survives_a_restart(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            await here.publish_version(0)
            async with running(here, caplog) as agent:
                await here.announce_round(1, 0)
                await here.receive(Checkin, round=1)
                await here.tell(here.assignment(1, 0, plan_sha256="0" * 64))
                await here.receive(Report, kind=ReportKind.TRAINING_FAILED, round=1)
                assert agent.agent._memory.failures() == 1
            caplog.clear()
            async with running(here, caplog) as agent:
                await agent.logged("examples_counted")
                assert agent.agent._state.resting
                await here.announce_round(2, 0)
                await here.receive(Checkin, round=2)
                assert not agent.agent._state.resting
                await here.tell(here.assignment(2, 0))
                await here.receive(Offer, round=2)
                assert agent.agent._memory.failures() == 0

    asyncio.run(scenario())


def test_a_damaged_state_file_is_begun_anew_and_the_boot_number_goes_on(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            await here.publish_version(0)
            async with running(here, caplog):
                offer = await trained(here)
                before = await here.receive(Presence, online=True)
            await here.receive(Presence, online=False)
            (tmp_path / "state" / "agent.sqlite").write_bytes(b"not a database" * 1000)
            async with running(here, caplog) as agent:
                after = await here.receive(Presence, online=True)
                assert after.boot > before.boot
                assert agent.events("agent_state_damaged")
                # Its update has no row any more: it is not offered, and its file is gone.
                assert not list((tmp_path / "state" / "outbox").iterdir())
                await here.announce_round(2, 0)
                await here.receive(Checkin, round=2)
                assert here.heard(Offer, round=offer.round) == []

    asyncio.run(scenario())


def test_a_version_announced_again_while_it_is_fetched_is_put_into_use(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog),
        ):
            announcement, blobs = here.version(0)
            await here.announce(announcement)
            await here.receive(Presence, online=True)
            # The same version in another message: the coordinator was started again.
            await here.announce(here.version(0)[0])
            await here.publish_blobs(blobs)
            await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)

    asyncio.run(scenario())


def test_a_training_process_killed_while_it_counts_the_examples_counts_them_again(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog) as agent,
        ):
            async with asyncio.timeout(60):
                while agent.trainer.pid is None:  # noqa: ASYNC110 -- nothing tells of a start
                    await asyncio.sleep(0.001)
            os.kill(agent.trainer.pid, signal.SIGKILL)
            await agent.logged("examples_counted")
            assert [event["examples"] for event in agent.events("examples_counted")] == [400]
            assert not agent.events("examples_not_counted")

    asyncio.run(scenario())


def test_a_roll_call_is_answered_with_the_birth_of_this_life(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog),
        ):
            born = await here.receive(Presence, online=True)
            topic = here.topics.announcement(RollCall)
            await here.link.publish(topic, RollCall(spread_s=0.2).model_dump_json().encode())
            assert (await here.receive(Presence, online=True)).boot == born.boot

    asyncio.run(scenario())


def test_a_rejected_update_and_a_retry_are_settled_and_waited_for(
    mosquitto: MosquittoBroker, tmp_path: Path, caplog
) -> None:
    """Asynchronous mode, over the wire: after its receipt the device comes for the open round."""

    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            running(here, caplog) as agent,
        ):
            await here.publish_version(0)
            await here.announce_round(1, 0, RoundPhase.TRAINING, oldest=1)
            await here.receive(Checkin, round=1)
            await here.tell(here.assignment(1, 0, local_epochs=400))
            await agent.logged("training")
            await here.publish_version(1)
            for number in (2, 3):
                await here.announce_round(number, 1, RoundPhase.TRAINING, oldest=1)
            offer = await here.receive(Offer, round=1, base=0)
            await here.take_upload(offer)
            assert here.heard(Checkin) == []
            await here.send_receipt(offer, ReceiptStatus.REJECTED)
            await here.receive(Checkin, round=3, version=1)
            await here.tell(Retry(round=3, after_s=0, spread_s=0.2))
            await here.receive(Checkin, round=3)
            await here.tell(here.assignment(3, 1))
            assert (await here.receive(Offer, round=3)).base == 1

    asyncio.run(scenario())
