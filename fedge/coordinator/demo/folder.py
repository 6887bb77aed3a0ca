"""The folder that a demonstration writes: claimed, cleared of the last one, and laid out.

OUT/report.png  model.onnx  summary.json       what came out
OUT/logs/                                      everything that every program said
OUT/predictions/                               the examples that devices were shown
OUT/broker/  coordinator/  devices/NAME/       each program's configuration and state
OUT/data/                                      the test set, and the data before it was split
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import IO

from fedge.schemas.errors import ConfigError

MARKER = ".fedge-demo"
_OWN_FOLDERS = ("broker", "coordinator", "data", "devices", "logs", "predictions")
_OWN_FILES = ("report.png", "model.onnx", "summary.json")


class DemoFolder:
    """A claimed folder; make it with `claim`."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path = path
        self._lock = lock
        self.logs = path / "logs"
        self.data = path / "data"
        self.devices = path / "devices"
        self.broker = path / "broker"
        self.coordinator = path / "coordinator"
        self.predictions = path / "predictions"
        self.report = path / "report.png"
        self.model = path / "model.onnx"
        self.summary = path / "summary.json"

    @classmethod
    def claim(cls, path: Path) -> DemoFolder:
        """The folder at `path`, empty but for what is not a demonstration's. Held until exit.

        Raises `ConfigError` if it holds something and no demonstration made it, if another
        demonstration uses it now, or if it cannot be written.
        """
        path = path.absolute()
        marker = path / MARKER
        try:
            if path.exists() and not marker.exists() and any(path.iterdir()):
                raise ConfigError(
                    f"{path} is not empty and was not made by `fedge demo`: name another folder "
                    "with --out"
                )
            path.mkdir(parents=True, exist_ok=True)
            lock = marker.open("ab")
            _hold(lock, path)
            for name in _OWN_FOLDERS:
                shutil.rmtree(path / name, ignore_errors=True)
                (path / name).mkdir()
            for name in _OWN_FILES:
                (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}") from error
        return cls(path, lock)

    def release(self) -> None:
        """Lets another demonstration claim it."""
        self._lock.close()

    def device(self, name: str) -> Path:
        """The folder of one device, which holds its part of the data and nothing of the others'."""
        folder = self.devices / name
        folder.mkdir(exist_ok=True)
        return folder


def _hold(lock: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(
            f"another demonstration runs in {path}: wait for it, or name another folder with --out"
        ) from error
