"""The cyclic strategy is PySyft's loop: the model visits the devices one after another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedge.coordinator.rounds import device_seed
from fedge.edge_agent.batching import epoch_order
from fedge.schemas.tensors import read_tensors
from tests.brokers import MosquittoBroker
from tests.fleet import fleet, tiny_examples
from tests.tiny_task import Net, task

pytestmark = pytest.mark.e2e

BATCH, RATE, VISITS = 8, 0.1, 7


def test_cyclic_with_one_local_step_equals_centralised_sgd_over_the_same_batches(
    mosquitto: MosquittoBroker, tmp_path: Path
) -> None:
    data = {f"d{index}": tiny_examples(20 + 3 * index, seed=index) for index in range(3)}

    async def scenario() -> None:
        async with fleet(
            mosquitto.port,
            tmp_path,
            round={"goal": 3, "strategy": "cyclic", "retry_s": 0, "versions": VISITS},
            training={"local_epochs": 1, "local_steps": 1, "batch_size": BATCH},
        ) as here:
            here.start_coordinator()
            for name, examples in data.items():
                here.start_agent(name, examples)
            await here.version(VISITS)

        net = Net()
        net.load_state_dict(task.new_model().state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        for visit in range(1, VISITS + 1):
            report = here.report(visit)
            # The ring is in the order of the names, whoever checks in first.
            (visited,) = [p.device for p in report.participants]
            assert visited == f"d{(visit - 1) % 3}"
            x, y = data[visited]
            seed = device_seed(report.round.seed, visited)
            rows = epoch_order(len(x), seed=seed, epoch=0)[:BATCH]
            optimizer.zero_grad()
            inputs, targets = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
            assert report.version is not None
            with here.store() as store:
                made = read_tensors(store.blobs.path(report.version.weights.sha256))
            for name, tensor in net.state_dict().items():
                np.testing.assert_allclose(made[name], tensor.numpy(), rtol=0, atol=1e-5)

    asyncio.run(scenario())
