"""The store: the one door to the coordinator's database and blob folder.

Methods are synchronous and short; what writes is durable when it returns. It decides nothing about
rounds: it keeps what was decided, and refuses what would break a promise (a second contribution
of one device to one round, a version number that does not rise).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fedge.coordinator.store.blobs import Blobs
from fedge.coordinator.store.database import Database, sqlite_file, sqlite_url
from fedge.coordinator.store.devices import Devices
from fedge.coordinator.store.evaluations import Evaluations
from fedge.coordinator.store.housekeeping import Housekeeping
from fedge.coordinator.store.notes import Notes
from fedge.coordinator.store.ownership import check_folder
from fedge.coordinator.store.participants import Participants
from fedge.coordinator.store.retained import Retained
from fedge.coordinator.store.rollouts import Rollouts
from fedge.coordinator.store.rounds import Rounds
from fedge.coordinator.store.versions import Versions
from fedge.coordinator.store.word_counts import WordCounts
from fedge.schemas.closing import Closing
from fedge.schemas.errors import ConfigError
from fedge.schemas.state_lock import StateLock

BLOBS_FOLDER = "blobs"


class Store(
    Closing,
    Versions,
    Rounds,
    Participants,
    Evaluations,
    Rollouts,
    WordCounts,
    Devices,
    Retained,
    Notes,
    Housekeeping,
):
    """The coordinator's durable state; open it with `open`.

    Any thread may call it: each call is one transaction on a connection of its own. Every method
    raises `StoreUnavailable`, with nothing changed, while the disk or the database cannot be used.
    """

    def __init__(self, database: Database, blobs: Blobs, lock: StateLock | None) -> None:
        self.blobs = blobs
        self._database = database
        self._lock = lock

    @classmethod
    def open(
        cls,
        state_dir: Path,
        url: str | None = None,
        *,
        blobs: str | None = None,
        create: bool = False,
        serve: bool = False,
    ) -> Store:
        """The store in `state_dir`, its database at `url` or in the folder itself.

        `blobs`: the URL of another place for the blobs, of which the folder then holds copies.
        `create`: make the folder and the tables if they are missing, and bring older tables up to
        date. `serve`: hold the locks of the one process that runs rounds; commands that look need
        not. Raises `ConfigError` if there is no state and `create` is False, if another process
        serves it, if the files in the folder or the other place are another state's, if it is of
        another release, or if a URL cannot be used; `StoreError` if the database or the other place
        refused.
        """
        url = url or sqlite_url(state_dir)
        database_file = sqlite_file(url)
        if create:
            _make_folder(state_dir)
        elif not (database_file or state_dir).exists():
            raise ConfigError(
                f"there is no coordinator state in {state_dir.resolve()}: start `fedge serve` first"
            )
        with ExitStack() as undo:
            lock = None
            if serve:
                lock = StateLock(state_dir, "coordinator")
                undo.callback(lock.close)
                # Before there are tables: a database that may not serve here stays empty.
                check_folder(state_dir, state_dir / BLOBS_FOLDER, url)
            database = Database(url, create=create, serve=serve)
            undo.callback(database.close)
            folder = state_dir / BLOBS_FOLDER
            if blobs is None:
                store = cls(database, Blobs(folder), lock)
            else:
                # fsspec is needed by few.
                from fedge.coordinator.store.remote_blobs import (  # noqa: PLC0415 -- as above
                    RemoteBlobs,
                )

                store = cls(database, RemoteBlobs(folder, blobs), lock)
            if serve:
                store.own()
            undo.pop_all()
        return store

    @property
    def database(self) -> Database:
        """The database itself, for who copies or checks all of it."""
        return self._database

    def close(self) -> None:
        """Closes the database and releases the locks."""
        self._database.close()
        if self._lock is not None:
            self._lock.close()


def _make_folder(state_dir: Path) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the state folder {state_dir} cannot be made: {error.strerror}"
        ) from error
