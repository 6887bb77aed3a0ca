"""One round over MQTT is the textbook's round: McMahan et al. 2017, Algorithm 1, in plain torch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedge.coordinator.rounds import device_seed
from fedge.coordinator.store import ParticipantStatus
from fedge.edge_agent.batching import epoch_order
from fedge.schemas.tensors import read_tensors
from tests.brokers import MosquittoBroker
from tests.fleet import Examples, Fleet, fleet, tiny_examples
from tests.tiny_task import Net, task

pytestmark = pytest.mark.e2e

BATCH, RATE, EPOCHS = 8, 0.1, 2


def client_update(
    weights: dict[str, torch.Tensor], examples: Examples, seed: int
) -> dict[str, torch.Tensor]:
    net = Net()
    net.load_state_dict(weights)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    x, y = map(torch.from_numpy, examples)
    for epoch in range(EPOCHS):
        order = epoch_order(len(x), seed=seed, epoch=epoch)
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: (net.state_dict()[name] - weights[name]).detach() for name in weights}


def fedavg(
    weights: dict[str, torch.Tensor], data: dict[str, Examples], seeds: dict[str, int]
) -> dict[str, torch.Tensor]:
    total = sum(len(data[name][1]) for name in seeds)
    new = {name: tensor.clone() for name, tensor in weights.items()}
    for device, seed in seeds.items():
        share = len(data[device][1]) / total
        for name, delta in client_update(weights, data[device], seed).items():
            new[name] += share * delta
    return new


def by_label(examples: Examples, parts: int) -> list[Examples]:
    order = np.argsort(examples[1], kind="stable")
    return [(examples[0][rows], examples[1][rows]) for rows in np.array_split(order, parts)]


def split_at(examples: Examples, *cuts: int) -> list[Examples]:
    xs, ys = (np.split(array, cuts) for array in examples)
    return list(zip(xs, ys, strict=True))


EXAMPLES = tiny_examples(90, seed=1)
SPLITS = {
    "iid": split_at(EXAMPLES, 30, 60),
    "non_iid": by_label(EXAMPLES, 3),
    "unequal_sizes": split_at(EXAMPLES, 5, 26),
}


async def one_round(here: Fleet, data: dict[str, Examples]) -> None:
    here.start_coordinator()
    for name, examples in data.items():
        here.start_agent(name, examples)
    await here.version(1)


def check_against_the_textbook(here: Fleet, data: dict[str, Examples], cohort: int) -> None:
    report = here.report(1)
    asked = [p.device for p in report.participants]
    assert len(asked) == cohort
    assert {p.status for p in report.participants} == {ParticipantStatus.ACCEPTED}
    seeds = {device: device_seed(report.round.seed, device) for device in asked}
    initial = task.new_model().state_dict()
    expected = fedavg(initial, data, seeds)
    with here.store() as store:
        version = store.version(1)
        assert version is not None
        made = read_tensors(store.blobs.path(version.weights.sha256))
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(made[name], tensor.numpy(), rtol=0, atol=1e-5)
        assert not np.allclose(made[name], initial[name].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_a_round_over_mqtt_equals_textbook_fedavg(
    split: str, mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    data = {f"d{index}": part for index, part in enumerate(SPLITS[split])}

    async def scenario() -> None:
        async with fleet(
            mosquitto.port, tmp_path, round={"goal": 3, "over_selection": 1.0, "versions": 1}
        ) as here:
            await one_round(here, data)
            check_against_the_textbook(here, data, cohort=3)

    asyncio.run(scenario())


def test_a_partial_cohort_equals_textbook_fedavg_of_those_who_were_chosen(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    parts = split_at(tiny_examples(120, seed=2), 10, 35, 70, 90)
    data = {f"d{index}": part for index, part in enumerate(parts)}

    async def scenario() -> None:
        # The goal of 2 with over-selection 1.0 chooses as soon as two are ready: of five devices.
        async with fleet(
            mosquitto.port, tmp_path, round={"goal": 2, "over_selection": 1.0, "versions": 1}
        ) as here:
            await one_round(here, data)
            check_against_the_textbook(here, data, cohort=2)

    asyncio.run(scenario())
