"""Asynchronous mode over MQTT: every version is what FedBuff makes of the updates in its buffer."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedge.coordinator.rounds import device_seed
from fedge.coordinator.store import Outcome, ParticipantStatus
from fedge.edge_agent.trainer.process import TrainerPool
from fedge.schemas.errors import RejectReason
from fedge.schemas.messages import Assignment, Receipt, ReceiptStatus, RoundAnnouncement
from fedge.schemas.tensors import encode_tensors, read_tensors
from tests.brokers import MosquittoBroker
from tests.e2e.test_textbook import client_update
from tests.fleet import Examples, Fleet, fleet, tiny_examples
from tests.scripted_device import scripted_device

pytestmark = pytest.mark.e2e


class Unhurried(TrainerPool):
    """Training processes that take their time, each job another."""

    def __init__(self, seed: int) -> None:
        super().__init__(2)
        self._rng = random.Random(seed)

    async def run(self, job, on_progress=None):
        answer = await super().run(job, on_progress)
        await asyncio.sleep(self._rng.lognormvariate(-2.0, 1.0))
        return answer


def tensors_of(here: Fleet, number: int) -> dict[str, torch.Tensor]:
    with here.store() as store:
        version = store.version(number)
        assert version is not None
        return {
            name: torch.from_numpy(np.array(tensor))
            for name, tensor in read_tensors(store.blobs.path(version.weights.sha256)).items()
        }


def check_against_fedbuff(here: Fleet, data: dict[str, Examples], number: int) -> list[int]:
    """Version `number` is the sum of its buffer, in plain torch; returns the stalenesses in it."""
    with here.store() as store:
        version = store.version(number)
        assert version is not None
        assert version.round is not None
        counted = store.accepted_in(version.round)
        seeds = {p.round: store.round_report(p.round).round.seed for p in counted}  # type: ignore[union-attr]
    assert len(counted) == here.settings.round.goal
    base = tensors_of(here, number - 1)
    total = sum(len(data[p.device][1]) for p in counted)
    expected = {name: tensor.clone() for name, tensor in base.items()}
    staleness = []
    for p in counted:
        assert p.base is not None
        behind = number - 1 - p.base
        staleness.append(behind)
        weight = len(data[p.device][1]) / total / (1 + behind) ** 0.5
        seed = device_seed(seeds[p.round], p.device)
        update = client_update(tensors_of(here, p.base), data[p.device], seed)
        for name, delta in update.items():
            expected[name] += weight * delta
    made = tensors_of(here, number)
    for name, tensor in expected.items():
        np.testing.assert_allclose(made[name], tensor.numpy(), rtol=0, atol=2e-5)
    return staleness


def test_every_version_is_the_textbooks_sum_of_its_buffer(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    data = {f"d{index}": tiny_examples(10 + 7 * index, seed=index) for index in range(5)}
    versions = 8

    async def scenario() -> None:
        settings = {"mode": "async", "goal": 2, "concurrency": 5, "versions": versions}
        async with fleet(mosquitto.port, tmp_path, round=settings) as here:
            here.pool = Unhurried(seed=1)
            here.start_coordinator()
            for name, examples in data.items():
                here.start_agent(name, examples)
            await here.version(versions)
            stale = [
                s for n in range(1, versions + 1) for s in check_against_fedbuff(here, data, n)
            ]
            # A device that is slower than two others lands in a later buffer.
            assert max(stale) > 0
            check_each_is_counted_once(here)

    asyncio.run(scenario())


def check_each_is_counted_once(here: Fleet) -> None:
    with here.store() as store:
        closed = {record.number: record for record in store.rounds()}
        seen = set()
        for number, record in closed.items():
            if record.outcome is Outcome.AGGREGATED:
                for p in store.accepted_in(number):
                    assert (p.round, p.device) not in seen
                    seen.add((p.round, p.device))
        for number in closed:
            for p in store.participants(number):
                if p.status is ParticipantStatus.ACCEPTED:
                    assert p.counted_in in closed


def test_an_update_that_is_too_stale_is_refused_and_says_so(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    async def scenario() -> None:
        settings = {"mode": "async", "goal": 1, "concurrency": 2, "max_staleness": 0}
        async with (
            fleet(mosquitto.port, tmp_path, round=settings) as here,
            scripted_device(here, "slow") as slow,
            scripted_device(here, "quick") as quick,
        ):
            here.start_coordinator()
            await here.version(0)
            assignments: dict[str, Assignment] = {}
            for device in (slow, quick):
                await device.receive(RoundAnnouncement, round=1)
                await device.check_in(1)
                assignments[device.name] = await device.receive(Assignment)
            update = zero_update(here)
            receipt = await quick.upload(assignments["quick"], update)
            assert receipt.status is ReceiptStatus.ACCEPTED
            await here.version(1)
            await slow.receive(RoundAnnouncement, round=2)
            offer = slow.offer_of(assignments["slow"], slow.describe(update))
            await slow.send(offer)
            refused = await slow.receive(Receipt)
            assert refused.status is ReceiptStatus.REJECTED
            assert refused.reason is RejectReason.LATE

    asyncio.run(scenario())


def zero_update(here: Fleet) -> bytes:
    tensors = tensors_of(here, 0)
    return encode_tensors({name: np.zeros_like(tensor.numpy()) for name, tensor in tensors.items()})
