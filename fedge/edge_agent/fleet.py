"""Many virtual devices in one process, for simulation: real links, real messages, one loop.

Each device has its own name, sessions, state folder and part of the data; they share only the
training processes. Nothing in the agent knows that it is one of many.
"""

from __future__ import annotations

import asyncio
import random

from pydantic import TypeAdapter, ValidationError

from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.data.config import PartitionConfig
from fedge.edge_agent.settings import Settings
from fedge.edge_agent.trainer.process import Trainer
from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import DeviceName

_DEVICE_NAME: TypeAdapter[str] = TypeAdapter(DeviceName)


def virtual_devices(settings: Settings, count: int, split: str, seed: int) -> list[Settings]:
    """The settings of `count` devices made from one: names, folders and parts of the data.

    Raises `ConfigError` if the settings have no data to divide, or divide it already.
    """
    if settings.data is None:
        raise ConfigError("a fleet needs [data] to divide among its devices")
    if settings.data.partition is not None:
        raise ConfigError("remove [data.partition]: a fleet makes the partition itself")
    devices = []
    for index in range(count):
        name = f"{settings.device}-{index:04d}"
        partition = PartitionConfig(scheme=split, index=index, of=count, seed=seed)
        try:
            _DEVICE_NAME.validate_python(name)
        except ValidationError as error:
            raise ConfigError(f"{name!r} is too long a name: shorten device") from error
        devices.append(
            settings.model_copy(
                update={
                    "device": name,
                    "state_dir": settings.state_dir / name,
                    "data": settings.data.model_copy(update={"partition": partition}),
                }
            )
        )
    return devices


async def run_fleet(devices: list[Settings], trainer: Trainer, seed: int) -> None:
    """Runs every device until cancelled; `seed` fixes their jitter."""
    async with asyncio.TaskGroup() as group:
        for index, settings in enumerate(devices):
            agent = EdgeAgent(settings, trainer, random.Random(f"{seed}/{index}"))  # noqa: S311 -- jitter
            group.create_task(agent.run(), name=settings.device)
