"""Real brokers for tests: Mosquitto and amqtt as processes of their own on 127.0.0.1.

    with MosquittoBroker(folder) as broker:
        ... connect to 127.0.0.1:broker.port ...
        broker.kill()      # kill -9: what it held in memory is gone
        broker.start()     # on the same port, as after a reboot

Every broker owns a folder, where its configuration and its log (`broker.log`) are. A broker that
does not come up raises with the end of its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
START_LIMIT_S = 20.0

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
"""The Mosquitto binary, or None where it is not installed."""


def find_free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class BrokerProcess:
    """A broker in a process of its own. Subclasses say how to configure and start it."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or find_free_port()
        self.log_path = folder / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Writes the configuration and returns the command line."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        assert self._process is not None, "the broker is not running"
        return self._process.pid

    def start(self) -> None:
        """Starts the broker and returns when it accepts connections."""
        assert self._process is None, "the broker is running already"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        give_up_at = time.monotonic() + START_LIMIT_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                tail = self.log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{type(self).__name__} did not start on {self.port}:\n{tail}")
            # A broker offers nothing to wait on before its socket exists.
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends the broker in an orderly way; it may keep what its configuration lets it keep."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9: a power cut."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 0.5):
            return True
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class MosquittoBroker(BrokerProcess):
    """Mosquitto, open to anybody on 127.0.0.1 unless `settings` say otherwise.

    `settings`: lines of its configuration after the listener. Nothing is written to disk unless a
    line asks for persistence, so `kill` makes it forget everything.
    """

    def __init__(self, folder: Path, port: int | None = None, *, settings: tuple[str, ...] = ()):
        super().__init__(folder, port)
        self.settings = settings

    def command(self) -> list[str]:
        """Writes the configuration and returns the command line."""
        assert MOSQUITTO is not None, "mosquitto is not installed"
        lines = [f"listener {self.port} {HOST}", "log_dest stderr", "log_type all"]
        if os.geteuid() == 0:
            # It would become the user `mosquitto`, who may not read the test's files.
            lines.append("user root")
        if not any(line.startswith("allow_anonymous") for line in self.settings):
            lines.append("allow_anonymous true")
        path = self.folder / "mosquitto.conf"
        path.write_text("\n".join([*lines, *self.settings]) + "\n")
        return [MOSQUITTO, "-c", str(path)]


class AmqttBroker(BrokerProcess):
    """amqtt (MQTT 3.1.1 only, forgets everything when it ends, not secure)."""

    def command(self) -> list[str]:
        """Writes the configuration (JSON is YAML) and returns the command line."""
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{self.port}"}},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
        path = self.folder / "amqtt.yaml"
        path.write_text(json.dumps(config))
        return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(path)]
