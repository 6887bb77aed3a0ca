"""Where a device's personal model lies, and how what was learned from texts is forgotten.

Names and removals alone. The example store does it within the transaction of every forget, before
the answer, so it needs neither the agent nor the network, and hardly more than the standard
library: apps have the store in their own processes. What the files hold is for
`fedge.edge_agent.personal_models` and `fedge.edge_agent.trainer.checkpoint_file` to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from fedge.edge_agent.checkpoints import FOLDER as CHECKPOINTS
from fedge.edge_agent.checkpoints import Checkpoints
from fedge.edge_agent.durable import disk, partial_of

RECORD_FILE = "personal.json"
"""In the agent's `state_dir`."""
MODELS = "models"
"""The folder in it that holds the model and its weights."""

_ANY = re.compile(r"\.?personal-[0-9]{1,18}-[0-9a-f]{8,64}\.(onnx|safetensors)(\.part)?")
_MARKS = ("agent.sqlite", "active.json")
"""What only an agent's folder has: its memory, and which version is in use."""


def forget_learned(folder: Path) -> None:
    """Removes what an agent has learned from the texts of the example store in `folder`.

    The personal model, and a training that is suspended; nothing where no agent has its state: a
    store may lie in any folder, among files of others. On the disk when it returns. Raises
    `StoreUnavailable` if something cannot be removed now.
    """
    with disk(f"look into {folder}"):
        is_state = any((folder / mark).exists() for mark in _MARKS)
    if not is_state:
        return
    forget_personal(folder)
    if Checkpoints(folder / CHECKPOINTS).remove_all():
        sync_folder(folder / CHECKPOINTS)


def forget_personal(state_dir: Path) -> None:
    """Removes the personal model, and all that was on its way to one.

    On the disk when it returns. Raises `StoreUnavailable` if something cannot be removed now.
    """
    record = state_dir / RECORD_FILE
    with disk(f"delete {record}"):
        there = record.exists()
        for path in (record, partial_of(record)):
            path.unlink(missing_ok=True)
    there = remove_personal(state_dir / MODELS, lambda name: True) > 0 or there
    if there:
        sync_folder(state_dir / MODELS)
        sync_folder(state_dir)


def remove_personal(models: Path, unwanted: Callable[[str], bool]) -> int:
    """Removes the personal files with unwanted names, also those half written; how many."""
    removed = 0
    with disk(f"clear {models}"):
        names = [path.name for path in models.iterdir()] if models.is_dir() else []
        for name in names:
            if _ANY.fullmatch(name) and unwanted(name):
                (models / name).unlink(missing_ok=True)
                removed += 1
    return removed


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or removed in `folder` last through a power cut."""
    with disk(f"sync {folder}"):
        if folder.is_dir():
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
