"""What is made from a device's examples must not outlive what its user takes back.

Whoever writes a file that was learned from typed texts writes it here: while it is written no
forget can begin, and after a forget it is not written. So a forget, which removes those files
within its own transaction (`fedge.edge_agent.example_store`), leaves none behind. Examples of other
kinds cannot be forgotten; for them this is a plain write.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.durable import disk
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import ExampleStore
from fedge.schemas.errors import TrainingFailed


class ForgottenMeanwhile(TrainingFailed):
    """Some of what it was trained on was taken back since."""

    def __init__(self) -> None:
        super().__init__("some of what it was trained on was forgotten meanwhile")


@contextlib.contextmanager
def nothing_forgotten(
    data: DataConfig, limits: ExampleLimits | None, generation: int | None
) -> Iterator[None]:
    """No forget begins while this is held. Others wait that add or forget: do little inside.

    `generation`: of the store when it was read; None: it was no store. Raises `ForgottenMeanwhile`
    if it is another one now, and as `ExampleStore` does.
    """
    if generation is None or limits is None:
        yield
        return
    with ExampleStore(data.path, limits) as store, store.held() as present:
        if present != generation:
            raise ForgottenMeanwhile
        yield


def write_unless_forgotten(
    data: DataConfig,
    limits: ExampleLimits | None,
    generation: int | None,
    files: Mapping[Path, bytes],
) -> None:
    """Writes `files` and syncs them; their folders are the caller's to sync.

    Raises as `nothing_forgotten` does, `StoreUnavailable` if they cannot be written; none is left
    then.
    """
    try:
        with nothing_forgotten(data, limits, generation):
            for path, content in files.items():
                with disk(f"write {path}"):
                    # As private as the texts that it was learned from.
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                        file.write(content)
        for path in files:
            _sync(path)
    except BaseException:
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    # Apart from the writing: a slow card may take seconds, for which no app should wait.
    with disk(f"sync {path}"):
        try:
            opened = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ForgottenMeanwhile from None
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
