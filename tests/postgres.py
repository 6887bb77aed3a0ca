"""A real PostgreSQL for tests: a server of its own on a free port of 127.0.0.1.

    with PostgresServer() as server:
        ... connect to server.new_database() ...
        server.kill()      # kill -9 of the whole server: a power cut
        server.start()     # on the same port, with what it had committed

It runs as another user when the tests run as root, which PostgreSQL refuses, and syncs its disk as
in production: a commit that is not durable would pass tests that it should not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.brokers import HOST, find_free_port

START_LIMIT_S = 60.0
_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def _find_bin() -> Path | None:
    # Debian keeps them out of the path, so that its wrappers are used instead.
    for folder in (*(str(path) for path in reversed(_DEBIAN)), None):
        found = shutil.which("initdb", path=folder)
        if found is not None and (Path(found).parent / "postgres").exists():
            return Path(found).parent
    return None


POSTGRES_BIN = _find_bin()
"""The folder with `initdb` and `postgres`, or None where PostgreSQL is not installed."""
MISSING = "PostgreSQL is not installed (Debian: apt-get install postgresql)"

_CUT_OTHERS_OFF = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_LEFT_SCHEMAS = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'replaced-%'"
_TABLES = """
    SELECT tablename FROM pg_tables
    WHERE schemaname = 'public' AND tablename NOT IN ('alembic_version', 'facts')
"""
_FORGET_FACTS = "DELETE FROM facts WHERE name NOT IN ('schema_version', 'release')"


class PostgresServer:
    """A server with a data folder of its own, which goes when the block ends.

    Anybody on this computer may connect, as the user `fedge`.
    """

    def __init__(self) -> None:
        self.port = find_free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="fedge-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._has_used = False
        self._has_empty = False
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            user = names.get("postgres") or names["nobody"]
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._folder, user.pw_uid, user.pw_gid)

    def url(self, database: str) -> str:
        """The URL of a database on this server."""
        return f"postgresql+psycopg://fedge@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(name)

    def empty_database(self) -> str:
        """The URL of a database without tables; always the same one, and quicker than a new one.

        Whoever still uses it is cut off.
        """
        if not self._has_empty:
            self.run("CREATE DATABASE empty")
            self._has_empty = True
        self.run(_CUT_OTHERS_OFF, "empty")
        for (schema,) in self.run(_LEFT_SCHEMAS, "empty"):
            self.run(f'DROP SCHEMA "{schema}" CASCADE', "empty")
        self.run("DROP SCHEMA public CASCADE", "empty")
        self.run("CREATE SCHEMA public", "empty")
        return self.url("empty")

    def used_database(self) -> str:
        """The URL of a database that has the tables, without a row; always the same one.

        Ten times as quick as a new one. Whoever still uses it is cut off.
        """
        url = self.url("used")
        if not self._has_used:
            from fedge.coordinator.store.database import Database  # noqa: PLC0415 -- as above

            self.run("CREATE DATABASE used")
            Database(url, create=True).close()
            self._has_used = True
        self.run(_CUT_OTHERS_OFF, "used")
        for (schema,) in self.run(_LEFT_SCHEMAS, "used"):
            self.run(f'DROP SCHEMA "{schema}" CASCADE', "used")
        names = [name for (name,) in self.run(_TABLES, "used")]
        self.run(f"TRUNCATE {', '.join(names)}", "used")
        self.run(_FORGET_FACTS, "used")
        return url

    def run(self, statement: str, database: str = "postgres") -> list[Any]:
        """The rows of one statement, run beside everything else."""
        import psycopg  # noqa: PLC0415 -- it is there only where the server is wanted

        where = f"host={HOST} port={self.port} user=fedge dbname={database}"
        with psycopg.connect(where, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Starts the server and returns when it accepts connections."""
        assert self._process is None, "the server is running already"
        assert POSTGRES_BIN is not None, MISSING
        data = self._folder / "data"
        if not data.exists():
            self._call(
                *(POSTGRES_BIN / "initdb", "-D", data, "-U", "fedge", "--auth=trust"),
                *("--encoding=UTF8", "--locale=C.UTF-8"),
            )
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(POSTGRES_BIN / "postgres"), "-D", str(data), "-p", str(self.port)),
                    *("-h", HOST, "-k", str(self._folder), "-c", "shared_buffers=16MB"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                **self._as_user,
            )
        give_up_at = time.monotonic() + START_LIMIT_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.kill()
                tail = (self._folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"PostgreSQL did not start on {self.port}:\n{tail}")
            # It offers nothing to wait on before it accepts connections.
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the server in an orderly way; open connections are cut."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Ends the server at once, as a power cut would: it recovers at the next start."""
        # SIGKILL would leave its children and its shared memory behind.
        self._end(signal.SIGQUIT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _accepts(self) -> bool:
        import psycopg  # noqa: PLC0415 -- as above

        with contextlib.suppress(psycopg.Error):
            self.run("SELECT 1")
            return True
        return False

    def _call(self, *command: object) -> None:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            cwd=self._folder,
            check=False,
            **self._as_user,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")

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
        shutil.rmtree(self._folder, ignore_errors=True)
