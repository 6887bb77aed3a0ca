"""Where a device keeps the checkpoint of a training that is suspended: one at the most.

The agent's side: names and removals. What a checkpoint holds is the training process's business
(`fedge.edge_agent.trainer.checkpoint_file`), and an agent that waits loads nothing of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from fedge.edge_agent.durable import disk
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

FOLDER = "checkpoint"
"""In the agent's `state_dir`."""

_NAME = re.compile(r"\.?([0-9]{1,18})\.checkpoint(\.part)?")


class Checkpoints:
    """The folder of a device's checkpoints: one at the most, named by its round.

    What cannot be removed now is removed the next time, but for `remove_all`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, number: int) -> Path:
        """Where the checkpoint of a round is, or would be."""
        return self._folder / f"{number}.checkpoint"

    def keep_only(self, number: int) -> None:
        """Removes those of every other round: a device has one assignment."""
        self._remove(lambda found: found != number)

    def forget(self, number: int) -> None:
        """Removes that of this round: it is over, or its update is made."""
        self._remove(lambda found: found == number)

    def forget_before(self, number: int) -> None:
        """Removes those of older rounds: nobody wants their updates."""
        self._remove(lambda found: found < number)

    def remove_all(self) -> int:
        """Removes every one, also half written: what it was made from was forgotten. How many.

        Raises `StoreUnavailable` if one cannot be removed now.
        """
        removed = 0
        with disk(f"clear {self._folder}"):
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if _NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        try:
            paths = list(self._folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("checkpoint_not_removed", reason=str(error))
            return
        for path in paths:
            name = _NAME.fullmatch(path.name)
            if name is not None and unwanted(int(name[1])):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
