"""Looks at the host as often as it matters, and says when the device may train or may not.

While it trains a look is taken twice a second, because training must have stopped within 2 s of a
rule that breaks; otherwise rarely. The looks are begun at a steady rate, so a slow reading delays
the next one by no more than itself. The rules are judged in `fedge.edge_agent.eligibility`, the
policies in `fedge.edge_agent.participation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Protocol

from fedge.edge_agent.eligibility import (
    EligibilitySettings,
    Finding,
    Readings,
    Standing,
    local_time,
    look_at,
    stand,
)
from fedge.edge_agent.host.reader import HostReader
from fedge.edge_agent.participation import ParticipationSettings, Usage, allowances
from fedge.schemas.errors import StoreError
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

LOOK_TRAINING_S = 0.5
LOOK_WAITING_S = 2.0
"""While an assignment waits for the device to be eligible again, which may be any moment."""


class Pace(Enum):
    """What a reading is needed for."""

    TRAINING = "training"
    WAITING = "waiting"
    IDLE = "idle"


class Reader(Protocol):
    """Where the readings come from."""

    async def read(self) -> Readings:
        """One reading for each sensor that a rule needs."""
        ...


def watch_for(
    device: str,
    *,
    rules: EligibilitySettings | None,
    policies: ParticipationSettings,
    own_pids: Callable[[], Iterable[int]],
    used: Callable[[], list[Usage]],
    examples: Callable[[], int | None],
    changed: Callable[[Standing], None],
    wall_clock: Callable[[], float],
) -> EligibilityWatch | None:
    """The watch of a device on this host; None if neither a rule nor a limit is to be watched.

    `own_pids`: see `HostReader`; the rest as `EligibilityWatch` takes it.
    """
    if rules is None and not policies.has_limits:
        return None
    rules = rules or EligibilitySettings()
    return EligibilityWatch(
        device,
        rules=rules,
        policies=policies,
        reader=HostReader(rules, own_pids=own_pids, wall_clock=wall_clock),
        used=used,
        examples=examples,
        changed=changed,
        wall_clock=wall_clock,
    )


class EligibilityWatch:
    """The looks of one device. `changed` takes the first standing and each that differs.

    `used`: the ledger's usage, may raise `StoreError`; `examples`: None while not counted.
    """

    def __init__(
        self,
        device: str,
        *,
        rules: EligibilitySettings,
        policies: ParticipationSettings,
        reader: Reader,
        used: Callable[[], list[Usage]],
        examples: Callable[[], int | None],
        changed: Callable[[Standing], None],
        wall_clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._rules = rules
        self._policies = policies
        self._reader = reader
        self._used = used
        self._examples = examples
        self._changed = changed
        self._wall_clock = wall_clock
        self._pace = Pace.IDLE
        self._woken = asyncio.Event()
        self._unknown: frozenset[str] = frozenset()
        self.standing: Standing | None = None

    def set_pace(self, pace: Pace) -> None:
        """From now on looks are needed for this; if it is something else, the next is at once."""
        if pace is not self._pace:
            self._pace = pace
            self._woken.set()

    def look_again(self) -> None:
        """Something that counts has changed: the next look is at once."""
        self._woken.set()

    async def run(self) -> None:
        """Looks until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            self._woken.clear()
            await self._look()
            try:
                async with asyncio.timeout_at(begun_s + self._period_s(begun_s)):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        readings = await self._reader.read()
        wall_s = self._wall_clock()
        findings = look_at(self._rules, readings, local_time(wall_s))
        self._tell_unknown(findings)
        reasons = [finding.reason for finding in findings if not finding.holds]
        reasons += self._policies_in_the_way(wall_s)
        before = self.standing
        now_s = asyncio.get_running_loop().time()
        self.standing = stand(before, reasons, now_s, self._rules.steady_for_s)
        if before is None or before.eligible != self.standing.eligible:
            log.info(
                "eligible" if self.standing.eligible else "not_eligible",
                device=self._device,
                reason="; ".join(self.standing.reasons) or None,
            )
            self._changed(self.standing)

    def _policies_in_the_way(self, wall_s: float) -> list[str]:
        if not self._policies.has_limits:
            return []
        try:
            used = self._used()
        except StoreError as error:
            return [f"the ledger of what was used cannot be read: {error}"]
        found = allowances(self._policies, used, self._examples(), wall_s)
        return [allowance.reason for allowance in found if not allowance.holds]

    def _tell_unknown(self, findings: list[Finding]) -> None:
        """Once for each rule and cause, and again if it was readable meanwhile."""
        unknown = {f"{one.rule}: {one.note}": one for one in findings if not one.known}
        for text in unknown.keys() - self._unknown:
            log.warning(
                "reading_unknown",
                device=self._device,
                rule=unknown[text].rule,
                reason=unknown[text].note,
                training="allowed" if unknown[text].holds else "refused",
            )
        self._unknown = frozenset(unknown)

    def _period_s(self, now_s: float) -> float:
        match self._pace:
            case Pace.TRAINING:
                period_s = LOOK_TRAINING_S
            case Pace.WAITING:
                period_s = min(LOOK_WAITING_S, self._rules.look_every_s)
            case Pace.IDLE:
                period_s = self._rules.look_every_s
        standing = self.standing
        if standing is not None and not standing.eligible and standing.good_since_s is not None:
            steady_at_s = standing.good_since_s + self._rules.steady_for_s
            period_s = min(period_s, max(steady_at_s - now_s, LOOK_TRAINING_S))
        return period_s
