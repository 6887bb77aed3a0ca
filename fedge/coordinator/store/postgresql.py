"""What only PostgreSQL knows: who may write, who serves, and what became of a commit in doubt.

Writers wait for one another at an advisory lock of the transaction, so that every check that a
transaction makes still holds when it commits, as with SQLite. The one coordinator that serves holds
another lock on a connection of its own, and signs each of its transactions in the row `writer` of
`facts`: a coordinator that lost the lock, and after which another has served, cannot sign any more
(a fencing token: Kleppmann 2016, "How to do distributed locking"). The signature also tells whether
a commit happened whose answer was lost with the connection.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import URL, Connection, Engine, RootTransaction, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fedge.coordinator.store.tables import facts
from fedge.schemas.errors import ConfigError, StoreError, StoreUnavailable

LOCK_TIMEOUT_S = 10
"""How long a writer waits for another process's transaction before it gives up."""
CONNECT_TIMEOUT_S = 10
IN_DOUBT_S = 30.0
"""How long the answer to "was it committed?" is waited for."""
ASK_AGAIN_S = 0.25

_PASSING = ("08", "25006", "40", "42501", "53", "55P03", "57", "58")
"""SQLSTATEs, or their first two letters (PostgreSQL manual, appendix A): connection, read-only
server, conflict, no permission, no resources, lock not free, operator intervened, system error."""


def _key(purpose: str) -> str:
    # A database may hold several states, each in a schema of its own.
    return f"hashtextextended('fedge {purpose} ' || current_schema(), 0)"


_WRITE_LOCK = text(f"SELECT pg_advisory_xact_lock({_key('write')})")
_SERVE_LOCK = text(f"SELECT pg_try_advisory_lock({_key('serve')}), pg_backend_pid()")
_COLLECT_LOCK = text(f"SELECT pg_try_advisory_lock({_key('files')})")
_BACKUP_LOCK = text(f"SELECT pg_advisory_lock_shared({_key('files')})")
_STILL_SERVING = text(
    "SELECT EXISTS (SELECT FROM pg_locks"  # noqa: S608 -- put together from constants
    " WHERE locktype = 'advisory' AND granted AND pid = :pid"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    # A key of 64 bits is shown in two halves, and a 1 beside them (PostgreSQL manual, pg_locks).
    f" AND classid::bigint << 32 | objid::bigint = {_key('serve')} AND objsubid = 1)"
)


class PostgreSql:
    """A server, which may go away and come back. `url`: of the database, without a password."""

    def __init__(self, url: URL) -> None:
        given = url.query
        options = f"-c lock_timeout={LOCK_TIMEOUT_S}s -c synchronous_commit=on"
        wanted: dict[str, object] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            # A server that vanished without a word is noticed within half a minute.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "application_name": "fedge",
        }
        connect_args = {name: value for name, value in wanted.items() if name not in given}
        connect_args["options"] = f"{given.get('options', '')} {options}".strip()
        self.engine_options: dict[str, object] = {
            "pool_pre_ping": True,
            "connect_args": connect_args,
        }
        self._serving: Connection | None = None
        self._serving_pid = 0
        self._signature: str | None = None
        # One transaction at a time signs, so that the row tells of the latest, and of no other.
        self._signing = threading.Lock()

    def prepare(self, engine: Engine) -> None:
        """Nothing: the settings travel with each connection."""

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns the driver's errors into `StoreError` or `StoreUnavailable`."""
        try:
            yield
        except DBAPIError as error:
            kind = StoreUnavailable if _is_passing(error) else StoreError
            raise kind(f"the coordinator's database: {_in_a_line(error)}") from error
        except PoolTimeout as error:
            raise StoreUnavailable(f"the coordinator's database: {error}") from error
        except SQLAlchemyError as error:
            raise StoreError(f"the coordinator's database: {error}") from error

    @contextmanager
    def read(self, engine: Engine) -> Iterator[Connection]:
        """A transaction that sees one state."""
        with engine.connect() as connection:
            reader = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            with reader.begin():
                yield reader

    @contextmanager
    def write(self, engine: Engine) -> Iterator[Connection]:
        """A transaction beside which there is no other writer; durable when the block ends."""
        # Each statement sees what was committed before it began: with a snapshot of the whole
        # transaction, taken before the lock was had, the checks would read the past.
        if self._signature is None:
            with engine.connect() as connection, connection.begin():
                connection.execute(_WRITE_LOCK)
                yield connection
            return
        with self._signing, engine.connect() as connection:
            transaction = connection.begin()
            try:
                connection.execute(_WRITE_LOCK)
                mark = self._sign(engine, connection, self._signature)
                yield connection
            except BaseException:
                transaction.rollback()
                raise
            self._commit(connection, transaction, mark)

    def serve(self, engine: Engine) -> None:
        """Takes the lock of the one that serves. Raises `ConfigError` if another has it."""
        if not self._take_serving_lock(engine):
            raise ConfigError(
                f"a coordinator serves {engine.url!r} already; stop it, or name another database"
            )

    def begin_term(self, engine: Engine) -> None:
        """From now on each write is signed, and a coordinator that served before cannot write."""
        signature = secrets.token_hex(16)
        with self.write(engine) as connection:
            connection.execute(facts.delete().where(facts.c.name == "writer"))
            connection.execute(facts.insert().values(name="writer", value=f"{signature} 0"))
        self._signature = signature

    @contextmanager
    def collecting(self, engine: Engine) -> Iterator[bool]:
        """Whether files may be deleted now; no backup begins meanwhile."""
        with _on_its_own(engine) as connection:
            yield bool(connection.scalar(_COLLECT_LOCK))

    @contextmanager
    def backing_up(self, engine: Engine) -> Iterator[None]:
        """No file is deleted meanwhile."""
        with _on_its_own(engine) as connection:
            connection.execute(text("SET lock_timeout = 0"))
            connection.execute(_BACKUP_LOCK)
            yield

    def close(self) -> None:
        """Lets another coordinator serve."""
        self._release_serving_lock()

    def _sign(self, engine: Engine, connection: Connection, signature: str) -> str:
        held = connection.scalar(_STILL_SERVING, {"pid": self._serving_pid})
        if not held and not self._take_serving_lock(engine):
            raise StoreUnavailable(
                "the coordinator's database: the connection that says who serves was lost, and "
                "another coordinator serves now; stop one of the two"
            )
        mark = f"{signature} {secrets.token_hex(8)}"
        signed = connection.execute(
            update(facts)
            .where(facts.c.name == "writer", facts.c.value.startswith(signature))
            .values(value=mark)
        )
        if signed.rowcount != 1:
            self._release_serving_lock()
            raise StoreError(
                "the coordinator's database: another coordinator has served it meanwhile, so what "
                "this one knows is out of date; start it again"
            )
        return mark

    def _commit(self, connection: Connection, transaction: RootTransaction, mark: str) -> None:
        try:
            transaction.commit()
        except DBAPIError as error:
            if not _is_passing(error):
                raise
            # The answer was lost; the commit may have happened before that. Nothing that this
            # connection says from now on can be relied on.
            connection.invalidate()
            if not self._was_committed(connection.engine, mark):
                raise

    def _was_committed(self, engine: Engine, mark: str) -> bool:
        """Whether the transaction with that mark is durable. Raises `StoreError` if nobody says."""
        give_up_at = time.monotonic() + IN_DOUBT_S
        while True:
            try:
                with engine.connect() as connection, connection.begin():
                    # Whoever holds the lock may be that very transaction, about to end.
                    connection.execute(_WRITE_LOCK)
                    row = facts.select().where(facts.c.name == "writer")
                    return bool(connection.execute(row).one().value == mark)
            except DBAPIError as error:
                if not _is_passing(error) or time.monotonic() > give_up_at:
                    raise StoreError(
                        "the coordinator's database: the connection was lost in the middle of a "
                        f"commit, and nobody says whether it happened: {_in_a_line(error)}"
                    ) from error
            # A server that is away announces its return to nobody.
            time.sleep(ASK_AGAIN_S)

    def _take_serving_lock(self, engine: Engine) -> bool:
        self._release_serving_lock()
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            taken, pid = connection.execute(_SERVE_LOCK).one()
            connection.detach()
        except BaseException:
            connection.close()
            raise
        if taken:
            self._serving, self._serving_pid = connection, pid
        else:
            connection.close()
        return bool(taken)

    def _release_serving_lock(self) -> None:
        if self._serving is not None:
            self._serving.close()
            self._serving = None


@contextmanager
def _on_its_own(engine: Engine) -> Iterator[Connection]:
    """A connection that is closed for good at the end, and its locks with it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.detach()
        yield connection
        # The server notices the end of a connection in its own time.
        with suppress(DBAPIError):
            connection.execute(text("SELECT pg_advisory_unlock_all()"))


def _in_a_line(error: DBAPIError) -> str:
    # What follows is a picture of the statement, or a question to whoever sits before a terminal.
    return str(error.orig).partition("\n")[0]


def _is_passing(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        # What happens on this side of the connection has no code: it is about the connection.
        return type(error.orig).__name__ in ("OperationalError", "InterfaceError")
    return str(state).startswith(_PASSING)
