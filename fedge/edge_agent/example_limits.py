"""How long and how much of what is typed is kept, and what has to go when that is passed.

Works inside a transaction of the store, on its tables `examples` and `sides`; what it deletes is
erased by the caller. An erasure rewrites the file, so few deletions should do: each takes a little
more than it must.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from fedge.edge_agent.erasable_file import ErasableFile
from fedge.edge_agent.example_text import ROW_BYTES, size_bytes

SLACK = 0.02
"""When a text has expired, those that would within this part of `keep_days` go with it; when there
is too much, so much goes that this part of `limit_bytes` is free."""

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ExampleLimits:
    """What a store keeps.

    `keep_days`: no text is read when it was typed longer ago. `limit_bytes`: of all texts in UTF-8
    with `ROW_BYTES` for each, which is about the size of the file; the oldest go first. `hold_out`:
    the share of texts that are only measured on, 0 to below 1.
    """

    keep_days: float = 30.0
    limit_bytes: int = 16 * 1024 * 1024
    hold_out: float = 0.1

    def oldest(self, now: float) -> float:
        """What was typed before this has expired; seconds since the epoch, as `now`."""
        return now - self.keep_days * _DAY_S

    def passed(self, file: ErasableFile, now: float) -> bool:
        """Whether something has to go."""
        return self._has_expired(file, now) or _kept_bytes(file) > self.limit_bytes

    def apply(self, file: ErasableFile, now: float) -> None:
        """Deletes what has to go, if anything, and marks it for erasure. In a transaction."""
        if not self.passed(file, now):
            return
        if self._has_expired(file, now):
            early_s = self.keep_days * _DAY_S * SLACK
            file.run("DELETE FROM examples WHERE at < ?", self.oldest(now) + early_s)
        kept = _kept_bytes(file)
        if kept > self.limit_bytes:
            last = (0.0, 0)
            with closing(file.run("SELECT at, id, text FROM examples ORDER BY at, id")) as rows:
                for at, number, text in rows:
                    last = (at, number)
                    kept -= size_bytes(text)
                    if kept <= self.limit_bytes * (1 - SLACK):
                        break
            file.run("DELETE FROM examples WHERE (at, id) <= (?, ?)", *last)
        file.mark_deleted()

    def _has_expired(self, file: ErasableFile, now: float) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM examples WHERE at < ?)"
        return bool(file.value(query, self.oldest(now)))


DEFAULT_LIMITS = ExampleLimits()


def _kept_bytes(file: ErasableFile) -> int:
    return int(file.value("SELECT sum(text_bytes) + sum(examples) * ? FROM sides", ROW_BYTES))
