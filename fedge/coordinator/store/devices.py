"""Devices that were ever seen, and what was refused of them: facts for people, in batches."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select, true, update

from fedge.coordinator.store.database import Database
from fedge.coordinator.store.records import DeviceRecord, DeviceSighting, Refusal, RefusalRecord
from fedge.coordinator.store.rows import device_of, refusal_of
from fedge.coordinator.store.tables import devices, refusals


class Devices:
    """The part of the store that keeps devices and refusals."""

    _database: Database

    def count_refusals(self, refused: Iterable[Refusal]) -> None:
        """Counts each under its (round, device, reason), all in one transaction."""
        # A flood is one row, and one statement, however many messages it had.
        alike: dict[tuple[int, str, str], list[Refusal]] = {}
        for refusal in refused:
            key = (refusal.round or 0, refusal.device or "", refusal.reason.value)
            alike.setdefault(key, []).append(refusal)
        with self._database.write() as connection:
            for (number, device, reason), same in alike.items():
                refusal = same[-1]
                statement = self._database.upsert(refusals).values(
                    round=number,
                    device=device,
                    reason=reason,
                    count=len(same),
                    last_detail=refusal.detail,
                    last_at=refusal.at,
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["round", "device", "reason"],
                        set_={
                            "count": refusals.c.count + len(same),
                            "last_detail": statement.excluded.last_detail,
                            "last_at": statement.excluded.last_at,
                        },
                    )
                )

    def refusals(self) -> tuple[RefusalRecord, ...]:
        """Every count, the latest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(refusals).order_by(refusals.c.last_at.desc())).all()
        return tuple(refusal_of(row) for row in rows)

    def record_devices(self, sightings: Iterable[DeviceSighting]) -> None:
        """Keeps what became known of devices, in order, all in one transaction."""
        with self._database.write() as connection:
            for seen in sightings:
                known = {
                    name: value
                    for name in ("boot", "online", "examples", "version", "agent_version")
                    if (value := getattr(seen, name)) is not None
                }
                statement = self._database.upsert(devices).values(
                    {"online": False}
                    | known
                    | {"name": seen.name, "first_seen_at": seen.at, "last_seen_at": seen.at}
                )
                connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["name"], set_=known | {"last_seen_at": seen.at}
                    )
                )

    def set_all_offline(self) -> None:
        """No device is known to be connected; when each was last seen stays."""
        with self._database.write() as connection:
            connection.execute(
                update(devices).where(devices.c.online == true()).values(online=False)
            )

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that was ever seen, in name order."""
        with self._database.read() as connection:
            found = [device_of(row) for row in connection.execute(select(devices))]
        return tuple(sorted(found, key=lambda one: one.name))
