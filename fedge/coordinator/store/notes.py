"""Notes: small texts that the coordinator keeps for its next life, each under a name of its own."""

from __future__ import annotations

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.queries import fact_named
from fedge.coordinator.store.tables import facts


class Notes:
    """The part of the store that keeps what was learned. For the names see the table `facts`."""

    _database: Database

    def note(self, name: str) -> str | None:
        """The text under that name, None if none was kept."""
        with self._database.read() as connection:
            return fact_named(connection, name)

    def keep_note(self, name: str, value: str) -> None:
        """Keeps the text, instead of what was under that name before."""
        statement = self._database.upsert(facts).values(name=name, value=value)
        with self._database.write() as connection:
            connection.execute(
                statement.on_conflict_do_update(index_elements=["name"], set_={"value": value})
            )
