"""A real agent with a model of its own: what it may never touch, and what goes before it.

The broker is a real Mosquitto; the coordinator is played by hand; the agent is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedge.edge_agent.data.examples import open_examples
from fedge.edge_agent.engines.onnx_engine import OnnxEngine
from fedge.edge_agent.settings import load as load_settings
from fedge.edge_agent.training import TrainingResult, train
from fedge.edge_agent.training_settings import TrainingSettings
from fedge.schemas import messages, topics
from fedge.schemas.ids import sha256
from fedge.schemas.link.protocol import Delivery, Link
from fedge.schemas.messages import Assignment, Checkin, Offer, Presence, Report, ReportKind
from fedge.schemas.tensors import encode_tensors
from fedge.schemas.topics import Channel
from tests.brokers import MosquittoBroker
from tests.edge_agent.scripted_coordinator import ScriptedCoordinator, scripted_coordinator
from tests.edge_agent.test_agent_processes import LIMIT_S, Process, has_ended
from tests.edge_agent.test_eligibility_processes import GOOD, ON_BATTERY, RULES, supply

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux'"),
]

QUICK = "\n[personalisation]\nepochs = 5\nlearning_rate = 0.05\nsettle_s = 0.2\n"
LONG = "\n[personalisation]\nepochs = 1000\nlearning_rate = 1e-5\nsettle_s = 0.2\n"


class Owner(Process):
    """An agent that holds some of its examples out."""

    def start(self) -> None:
        config = Path(self.command[-1])
        text = config.read_text()
        if "hold_out" not in text:
            config.write_text(text.replace("[data]\n", "[data]\nhold_out = 0.25\n"))
        super().start()

    def without_a_model_of_its_own(self) -> None:
        """Its next life has no [personalisation]."""
        config = Path(self.command[-1])
        config.write_text(config.read_text().replace(QUICK, ""))

    def forgets(self) -> None:
        """Its user runs `personal forget`."""
        command = [*self.command[:3], "personal", "forget", *self.command[-2:]]
        subprocess.run(command, check=True, timeout=LIMIT_S)

    def asked(self, *command: str) -> dict[str, Any]:
        """What a command of the device answers, as JSON."""
        done = subprocess.run(
            [sys.executable, "-m", "fedge.edge_agent", *command, "--json", "--config",
             self.command[-1]],
            capture_output=True, text=True, timeout=LIMIT_S, check=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextlib.contextmanager
def owner(here: ScriptedCoordinator, more: str) -> Iterator[Owner]:
    made = Owner(here, more)
    try:
        yield made
    finally:
        made.kill()


def personal_files(here: ScriptedCoordinator) -> list[Path]:
    return sorted(path for path in here.folder.rglob("*") if "personal" in path.name)


def expected(here: ScriptedCoordinator, work: Assignment) -> TrainingResult:
    """The update of this assignment, from the version's own weights."""
    plan = here.plan
    engine = OnnxEngine(plan.manifest, plan.train, None)
    data = load_settings(here.folder / "agent.toml").data
    assert data is not None
    settings = TrainingSettings.of(work)
    result = train(engine, plan.manifest, here.weights(work.base), open_examples(data), settings)
    assert isinstance(result, TrainingResult)
    return result


async def answered(here: ScriptedCoordinator, work: Assignment) -> bytes:
    """The update that the device sends for this assignment."""
    await here.announce_round(work.round, work.base)
    await here.receive(Checkin, round=work.round)
    await here.tell(work)
    offer = await here.receive(Offer, round=work.round)
    update = await here.take_upload(offer)
    await here.send_receipt(offer)
    return update


@contextlib.asynccontextmanager
async def overheard(here: ScriptedCoordinator):
    """Everything that anybody publishes in the population: (topic, payload)."""
    link: Link = here.make_link("eavesdropper")
    await link.subscribe(f"{here.topics.prefix}/#")
    await link.start()
    heard: list[tuple[str, bytes]] = []

    async def listen() -> None:
        while True:
            event = await link.next_event()
            if isinstance(event, Delivery):
                link.ack(event)
                heard.append((event.topic, bytes(event.payload)))

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        task.cancel()
        await link.close()


def test_a_personal_model_changes_no_update_and_nothing_of_it_is_ever_sent(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            scripted_coordinator(mosquitto.port, tmp_path) as here,
            overheard(here) as heard,
        ):
            with owner(here, QUICK) as agent:
                secrets: list[bytes] = []
                updates: list[bytes] = []
                for base in range(2):
                    await here.publish_version(base)
                    await agent.logged("personal_model", base + 1)
                    (weights,) = [p for p in personal_files(here) if p.suffix == ".safetensors"]
                    own = load_file(weights)
                    assert (own["w"] != here.weights(base)["w"]).any()
                    secrets += [own["w"].tobytes(), own["b"].tobytes(), weights.read_bytes()]
                    # What its update would be if it had begun from its own model.
                    secrets += [(own["w"] - here.weights(base)["w"]).tobytes()]
                    work = here.assignment(base + 1, base)
                    updates.append(await answered(here, work))
                    whole = await asyncio.to_thread(expected, here, work)
                    assert updates[-1] == encode_tensors(whole.delta)
                    # With the personal model still there.
                    assert agent.asked("personal", "status")["personal"]
                await here.listen(1)
            sent = [
                (topics.parse(topic), payload)
                for topic, payload in heard
                if topics.parse(topic).channel in (Channel.UP, Channel.UP_BULK, Channel.STATE)
            ]
            kinds = {address.message for address, _ in sent if address.message is not None}
            assert kinds == {Checkin, Offer, Presence, Report}
            bulk = {address.sha256 for address, _ in sent if address.channel is Channel.UP_BULK}
            assert bulk == {sha256(update) for update in updates}
            for _, payload in sent:
                assert not [secret for secret in secrets if secret in payload]
                assert b"personal" not in payload
            reports = [
                messages.decode(Report, payload)
                for address, payload in sent
                if address.message is Report
            ]
            assert {report.kind for report in reports} == {ReportKind.ACTIVATED}

    asyncio.run(scenario())


def test_predictions_come_from_the_personal_model_until_a_newer_version_is_in_use(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with owner(here, QUICK) as agent:
                await here.publish_version(0)
                await agent.logged("personal_model")
                answer = agent.asked("predict", "1,2,3")
                assert (answer["version"], answer["personal"]) == (0, True)
                (weights,) = [p for p in personal_files(here) if p.suffix == ".safetensors"]
                own = load_file(weights)
                scaled = np.array([1, 2, 3]) * own["scale"]
                value = float((scaled @ own["w"] + own["b"])[0])
                assert answer["values"][0] == pytest.approx(value, rel=1e-5)
                told = agent.asked("personal", "status")
                last = told["last"]
                assert (told["personal"], last["outcome"], last["version"]) == (True, "better", 0)
                assert last["personal"]["loss"] < last["common"]["loss"]
                assert last["training"] + last["hold_out"] == 400
                assert last["hold_out"] == 100
                layers = agent.asked("personal", "layers")["layers"]
                assert [one["trained"] for one in layers] == [["w", "b", "input_sum", "last_seed"]]
                # A version that moves on: it takes over at once, then its own personal model.
                await here.publish_version(1)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=1)
                await agent.logged("personal_model", 2)
                answer = agent.asked("predict", "1,2,3")
                assert (answer["version"], answer["personal"]) == (1, True)
                names = [path.name for path in personal_files(here)]
                assert len(names) == 3
                assert sum(name.startswith("personal-1-") for name in names) == 2
                agent.forgets()
                assert not agent.asked("predict", "1,2,3")["personal"]

    asyncio.run(scenario())


def test_an_assignment_stops_a_personal_training_which_begins_again_later(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with owner(here, LONG) as agent:
                await here.publish_version(0)
                await here.announce_round(1, 0)
                await here.receive(Checkin, round=1)
                await agent.logged("personal_training")
                work = here.assignment(1, 0)
                await here.tell(work)
                offer = await here.receive(Offer, round=1)
                (cut_off,) = agent.events("personal_training_cut_off")
                assert cut_off["version"] == 0
                assert agent.events("personal_model") == []
                update = await here.take_upload(offer)
                await here.send_receipt(offer)
                whole = await asyncio.to_thread(expected, here, work)
                assert update == encode_tensors(whole.delta)
                # In the same process, which was not ended for it.
                assert len(agent.events("trainer_started")) <= 1
                await agent.logged("personal_training", 3)  # the second begin, after its cut-off

    asyncio.run(scenario())


def test_a_rule_that_breaks_stops_a_personal_training_within_two_seconds(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            supply(here, GOOD)
            with owner(here, RULES + LONG) as agent:
                await here.publish_version(0)
                await agent.logged("personal_training")
                await here.listen(0.5)
                trainer = os.pidfd_open(agent.trainer_pid)
                begun_s = time.monotonic()
                supply(here, ON_BATTERY)
                assert await asyncio.to_thread(has_ended, trainer)
                took_s = time.monotonic() - begun_s
                print(f"stopped after {took_s:.3f} s")
                # What this machine may lay on top: other tests run on its two cores.
                assert took_s < 2.0 + 2.0
                await agent.logged("personal_training_cut_off")
                await here.listen(1.5)
                assert len(agent.events("personal_training")) == 2
                assert personal_files(here) == []
                supply(here, GOOD)
                await agent.logged("personal_training", 3)

    asyncio.run(scenario())


def test_a_personal_training_counts_towards_the_day_s_limit(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            limits = "\n[participation]\ndaily_training_s = 1.5\n"
            with owner(here, limits + LONG) as agent:
                await here.publish_version(0)
                await agent.logged("personal_training_cut_off")
                await agent.logged("not_eligible")
                assert "daily_training_s" in str(agent.events("not_eligible")[0]["reason"])
                await here.announce_round(1, 0)
                await here.listen(2)
                assert here.heard(Checkin) == []

    asyncio.run(scenario())


def test_killed_at_any_moment_the_next_life_answers_and_ends_what_was_begun(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with owner(here, QUICK) as agent:
                await here.publish_version(0)
                await here.receive(Report, kind=ReportKind.ACTIVATED, version=0)
                for life in range(6):
                    # A personal training takes about a second, from its process to its record.
                    await agent.logged("agent_started", life + 1)
                    await asyncio.sleep(0.25 * life)
                    agent.kill()
                    answer = agent.asked("predict", "1,2,3")
                    assert answer["version"] == 0
                    told = agent.asked("personal", "status")
                    assert told["personal"] == answer["personal"]
                    agent.start()
                while not agent.asked("personal", "status")["personal"]:
                    await here.listen(0.2)
                assert len(personal_files(here)) == 3
                # It is there: another life does not make it again.
                made = len(agent.events("personal_training"))
                agent.kill()
                agent.start()
                await here.listen(3)
                assert len(agent.events("personal_training")) == made

    asyncio.run(scenario())


def test_without_the_table_nothing_is_made_and_what_was_made_is_removed(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with scripted_coordinator(mosquitto.port, tmp_path) as here:
            with owner(here, QUICK) as agent:
                await here.publish_version(0)
                await agent.logged("personal_model")
                agent.kill()
                agent.without_a_model_of_its_own()
                agent.start()
                await agent.logged("agent_started", 2)
                assert personal_files(here) == []
                await here.listen(2)
                assert personal_files(here) == []
                assert len(agent.events("personal_model")) == 1

    asyncio.run(scenario())
