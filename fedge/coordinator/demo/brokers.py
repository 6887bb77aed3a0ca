"""The broker of a demonstration: Mosquitto where it is installed, else amqtt from the same wheel.

Either listens on this computer only and lets anybody in: good for a demonstration, and for nothing
else. amqtt gives every client every retained message, so it is never to be used for real data.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedge.schemas.errors import ConfigError

HOST = "127.0.0.1"
_SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin:/usr/local/opt/mosquitto/sbin"
"""Where packages put the binary although it is not on the path of an ordinary user."""


class BrokerChoice(StrEnum):
    """Which broker to start."""

    AUTO = "auto"
    MOSQUITTO = "mosquitto"
    AMQTT = "amqtt"


@dataclass(frozen=True, slots=True)
class DemoBroker:
    """A broker to start. `ready`: part of the line that it writes when it listens.

    `protocol`: what its clients should speak, as in `[broker]`.
    """

    name: str
    port: int
    command: tuple[str, ...]
    ready: str
    protocol: str
    notice: str | None = None


def choose_broker(choice: BrokerChoice, folder: Path) -> DemoBroker:
    """A broker on a free port of this computer, its configuration written to `folder`.

    Raises `ConfigError` if Mosquitto is asked for and not installed.
    """
    binary = None if choice is BrokerChoice.AMQTT else find_mosquitto()
    if binary is not None:
        return _mosquitto(binary, folder)
    if choice is BrokerChoice.MOSQUITTO:
        raise ConfigError(
            "mosquitto is not installed (Debian, Ubuntu, Raspberry Pi OS: "
            "apt-get install mosquitto); --broker amqtt needs no installation"
        )
    port = _free_port()
    command = (sys.executable, "-m", "fedge.coordinator.demo.embedded_broker", str(port))
    return DemoBroker(
        "amqtt", port, command, "broker_ready", "3.1.1", notice="demo broker: not secure"
    )


def find_mosquitto() -> str | None:
    """The path of the binary, None where it is not installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SYSTEM_FOLDERS)


def mosquitto_configuration(port: int, *, as_root: bool) -> Sequence[str]:
    """The lines of its configuration file."""
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        "persistence false",
        "log_dest stderr",
        "sys_interval 1",
    ]
    if as_root:
        # To change its user would make it lose the leash that ends it with the demonstration.
        lines.append("user root")
    return lines


def _mosquitto(binary: str, folder: Path) -> DemoBroker:
    port = _free_port()
    path = folder / "mosquitto.conf"
    path.write_text("\n".join(mosquitto_configuration(port, as_root=os.geteuid() == 0)) + "\n")
    return DemoBroker("mosquitto", port, (binary, "-c", str(path)), "listen socket", "auto")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
