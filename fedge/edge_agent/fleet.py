"""Many virtual devices in one process, for simulation: real links, real messages, one loop.

Each device has its own name, sessions, state folder and part of the data; they share only the
training processes. Nothing in the agent knows that it is one of many.
"""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedge.edge_agent.agent import EdgeAgent
from fedge.edge_agent.data.config import DataConfig, PartitionConfig
from fedge.edge_agent.settings import Settings, load
from fedge.edge_agent.trainer.process import Trainer
from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import DeviceName
from fedge.schemas.split_schemes import parse_scheme
from fedge.schemas.text_file import texts_by_user

CONFIG_FILE = "agent.toml"
USERS = "users"
"""The split that gives each device the texts of one user."""

FILES_A_DEVICE = 8
"""Two sockets, the state file with its log and index, a lock; now and then a blob that arrives."""
OTHER_FILES = 100

_DEVICE_NAME: TypeAdapter[str] = TypeAdapter(DeviceName)


def virtual_devices(settings: Settings, count: int, split: str, seed: int) -> list[Settings]:
    """The settings of `count` devices made from one: names, folders and parts of the data.

    `split`: `USERS`, or a scheme of `PartitionConfig`. Raises `ConfigError` if the settings have no
    data to divide, divide it already, or it cannot be divided so.
    """
    if settings.data is None:
        raise ConfigError("a fleet needs [data] to divide among its devices")
    if settings.data.partition is not None:
        raise ConfigError("remove [data.partition]: a fleet makes the partition itself")
    if settings.data.is_store:
        raise ConfigError(f"{settings.data.path} is one device's own: a fleet divides other files")
    if settings.apps.is_on:
        raise ConfigError("remove [apps]: one socket or port cannot be that of every device")
    divide = _by_user if split == USERS else _by_scheme
    shares = divide(settings.data, count, split, seed)
    return [_device(settings, index, share) for index, share in enumerate(shares)]


def described_devices(folder: Path) -> list[Settings]:
    """The devices whose configurations are `folder`/*/agent.toml, in the order of their folders.

    Raises `ConfigError` if there are none, two are the same device or share a state folder, or they
    want different training processes, which they share here.
    """
    paths = sorted(folder.glob(f"*/{CONFIG_FILE}"))
    if not paths:
        raise ConfigError(f"no */{CONFIG_FILE} in {folder}: a folder with one for each device")
    devices = [load(path) for path in paths]
    first = devices[0]
    names: dict[tuple[str, str], Path] = {}
    states: dict[Path, Path] = {}
    for path, one in zip(paths, devices, strict=True):
        same = names.setdefault((one.population, one.device), path)
        if same != path:
            raise ConfigError(f"{same} and {path} both name the device {one.device!r}")
        same = states.setdefault(one.state_dir.resolve(), path)
        if same != path:
            raise ConfigError(f"{same} and {path} have the same state_dir: {one.state_dir}")
        if (one.trainer, one.log_format) != (first.trainer, first.log_format):
            raise ConfigError(
                f"{path}: in one process all devices have the same [trainer] and log_format, and "
                f"{paths[0]} has others"
            )
    return devices


async def run_fleet(devices: list[Settings], trainer: Trainer, seed: int) -> None:
    """Runs every device until cancelled; `seed` fixes their jitter.

    Raises `ConfigError` if the host does not let this process open so many files.
    """
    _allow_open_files(OTHER_FILES + FILES_A_DEVICE * len(devices))
    async with asyncio.TaskGroup() as group:
        for index, settings in enumerate(devices):
            agent = EdgeAgent(settings, trainer, random.Random(f"{seed}/{index}"))  # noqa: S311 -- jitter
            group.create_task(agent.run(), name=settings.device)


def _allow_open_files(wanted: int) -> None:
    # What a login gets, often 1,024, is for programs that use select(2); asyncio does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            f"so many devices need {wanted} open files, and this process may have {hard}: host "
            "fewer, or raise the hard limit (ulimit -Hn, LimitNOFILE= in a unit)"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _device(settings: Settings, index: int, share: DataConfig) -> Settings:
    name = f"{settings.device}-{index:04d}"
    try:
        _DEVICE_NAME.validate_python(name)
    except ValidationError as error:
        raise ConfigError(f"{name!r} is too long a name: shorten device") from error
    return settings.model_copy(
        update={"device": name, "state_dir": settings.state_dir / name, "data": share}
    )


def _by_scheme(data: DataConfig, count: int, split: str, seed: int) -> Iterator[DataConfig]:
    try:
        parse_scheme(split)
    except ConfigError as error:
        raise ConfigError(f"{error}; or {USERS}, for texts that say whose they are") from error
    for index in range(count):
        partition = PartitionConfig(scheme=split, index=index, of=count, seed=seed)
        yield data.model_copy(update={"partition": partition})


def _by_user(data: DataConfig, count: int, _split: str, _seed: int) -> Iterator[DataConfig]:
    """User i of U for device i; with more devices than users, runs of a user's texts.

    A person who types on several devices types on one after the other: each device has an earlier
    or a later part, all about equally long.
    """
    if data.user is not None:
        raise ConfigError("remove user from [data]: --split users gives each device a user")
    texts = texts_by_user(data.path)
    if not texts:
        raise ConfigError(
            f'{data.path} names no users: --split users needs a .jsonl file of {{"user": …, '
            '"text": …} lines'
        )
    users = list(texts)
    for index in range(count):
        user = users[index % len(users)]
        # The devices index, index - U, index - 2U, … and index + U, … have the same user.
        share, of = index // len(users), 1 + (count - 1 - index % len(users)) // len(users)
        own = min(texts[user], data.limit or texts[user])
        if own < of:
            raise ConfigError(
                f"{count} devices for {len(users)} users are {of} for user {user!r}, who has "
                f"{own} texts: give fewer --devices"
            )
        partition = None if of == 1 else PartitionConfig(scheme="ordered", index=share, of=of)
        yield data.model_copy(update={"user": user, "partition": partition})
