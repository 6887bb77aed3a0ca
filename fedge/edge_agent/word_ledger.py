"""What this device has told of its words: the answers themselves, and what they have cost.

A file of its own, `word-counts.sqlite` in the state folder. An answer is on the disk before it is
first sent: whoever asks again gets the same bytes, because from many answers the noise could be
averaged away. The costs add up for as long as the file lives, and nothing here lets them go down. A
file that is damaged is not begun anew, as others are: what was told is not known then, and the
device takes no part until somebody deletes it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedge.edge_agent.sqlite_file import connect, sqlite_errors, transaction
from fedge.schemas.closing import Closing
from fedge.schemas.errors import FedgeError, StoreError
from fedge.schemas.messages import WordCountAnswer

FILE_NAME = "word-counts.sqlite"
ROUNDING = 1e-9
"""Costs are added in binary: ten times 0.1 is within a limit of 1."""

_BUSY_S = 1.0
_WHAT = "use what was told of words"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS told (
    campaign TEXT PRIMARY KEY,
    epsilon REAL NOT NULL,
    answer TEXT NOT NULL,
    heard INTEGER NOT NULL
) STRICT;
"""


class OverLimit(FedgeError):  # noqa: N818 -- the device's decision
    """Another answer would cost more than the device may tell. `spent`: so far."""

    def __init__(self, spent: float, epsilon: float, limit: float) -> None:
        super().__init__(
            f"epsilon_limit = {limit:g} in [word_counts]: {spent:g} was spent, and this costs "
            f"{epsilon:g}"
        )


@dataclass(frozen=True, slots=True)
class Told:
    """An answer. `heard`: the coordinator has it, or does not want it."""

    answer: WordCountAnswer
    heard: bool


class WordLedger(Closing):
    """The file in `state_dir`, made when absent.

    This and every method raises `StoreUnavailable` if the disk cannot be used now, and `StoreError`
    for a file that is damaged.
    """

    def __init__(self, state_dir: Path) -> None:
        self._db = connect(state_dir / FILE_NAME, _WHAT, busy_s=_BUSY_S, private=True)
        try:
            with sqlite_errors(_WHAT):
                self._db.executescript(_SCHEMA)
        except StoreError:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def spent(self) -> float:
        """The sum of the epsilons of all answers."""
        with closing(self._run("SELECT coalesce(sum(epsilon), 0.0) FROM told")) as rows:
            return float(rows.fetchone()[0])

    def answers(self) -> int:
        """How many word counts this device has told a word in."""
        with closing(self._run("SELECT count(*) FROM told")) as rows:
            return int(rows.fetchone()[0])

    def told(self, campaign: str) -> Told | None:
        """The answer to a campaign, if there is one."""
        with closing(
            self._run("SELECT answer, heard FROM told WHERE campaign = ?", campaign)
        ) as rows:
            row = rows.fetchone()
        if row is None:
            return None
        try:
            return Told(WordCountAnswer.model_validate_json(row[0]), heard=bool(row[1]))
        except ValidationError as error:
            raise StoreError(f"what was told of words cannot be read: {error}") from error

    def check(self, epsilon: float, limit: float) -> None:
        """Raises `OverLimit` if another answer would bring the sum above the limit."""
        spent = self.spent()
        if spent + epsilon > limit + ROUNDING:
            raise OverLimit(spent, epsilon, limit)

    def keep(self, answer: WordCountAnswer, epsilon: float, limit: float) -> None:
        """Keeps an answer before it is sent; the first of a campaign stays.

        Raises `OverLimit` as `check` does, and keeps nothing then.
        """
        with transaction(self._db, _WHAT):
            self.check(epsilon, limit)
            self._run(
                "INSERT INTO told VALUES (?, ?, ?, 0) ON CONFLICT (campaign) DO NOTHING",
                answer.campaign,
                epsilon,
                answer.model_dump_json(),
            )

    def heard(self, campaign: str) -> None:
        """The answer need not be said again."""
        self._run("UPDATE told SET heard = 1 WHERE campaign = ?", campaign)

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        with sqlite_errors(_WHAT):
            return self._db.execute(statement, values)
