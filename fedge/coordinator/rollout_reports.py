"""What `fedge rollout` prints: how far a rollout is, and what it waits for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

from fedge.coordinator import rollouts
from fedge.coordinator.reports import console, plain_table, print_json, utc_time
from fedge.coordinator.rollout_fleet import KnownDevice, RolloutFleet
from fedge.coordinator.rollouts import WISHED, Phase, Rollout, ServingMode, Wish
from fedge.coordinator.store import RolloutRecord, Store, TrialRecord
from fedge.schemas.messages import TrialOutcome

MOST_DEVICES = 20
"""Of those that rolled back, so many are listed; `--json` has all."""


_ASKED = {Wish.RUN: "go on", Wish.PAUSE: "pause", Wish.ABORT: "take the version back"}


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """Everything about one rollout, if there is one. `stable`: None with mode "every".

    `wanted`: answers before the next stage. `soak_left_s`: as far as it was written down; None
    while the stage waits for answers. `waits_for`: in words. `measured`: devices that compared the
    losses on their hold-outs; `loss_ratio`: the median of what they found, None without any.
    `vanished`: while it is open, the devices that it reaches, came since it began, gave no answer
    and were not seen for a day.
    """

    mode: ServingMode
    coordinator_running: bool
    stable: int | None
    newest: int | None
    rollout: RolloutRecord | None
    active: int
    rolled_back: int
    wanted: int
    soak_left_s: float | None
    waits_for: str
    measured: int
    loss_ratio: float | None
    reasons: Mapping[str, int]
    vanished: Sequence[str]
    trials: Sequence[TrialRecord]

    @classmethod
    def of(
        cls,
        store: Store,
        record: RolloutRecord | None,
        *,
        population: str,
        mode: ServingMode,
        running: bool,
        now: float,
    ) -> Self:
        """What the store says now. `now`: seconds since the epoch."""
        newest = store.newest_version()
        trials = () if record is None else store.trials(record.number)
        active = sum(one.outcome is TrialOutcome.ACTIVE for one in trials)
        wanted, soak_left_s, waits_for = 0, None, "nothing: no rollout was begun yet"
        vanished: tuple[str, ...] = ()
        if record is not None:
            policy = record.terms.policy
            state = Rollout(
                phase=record.phase,
                stage=record.stage,
                share=record.share,
                reached=record.reached,
                active=active,
                failed=len(trials) - active,
                soaked_s=record.soaked_s,
            )
            if record.phase.is_open:
                devices = store.born_devices()
                fleet = RolloutFleet(population, record.number, record.started_at)
                state = _among(state, fleet, devices, now)
                vanished = fleet.vanished(
                    devices, share=record.share, answered={one.device for one in trials}, now=now
                )
            wanted = rollouts.wanted(state, policy)
            if rollouts.soaks(state, policy):
                soak_left_s = max(0.0, policy.soak_s - record.soaked_s)
            waits_for = _waits_for(record, state, wanted, soak_left_s, running=running)
            if vanished and soak_left_s is None:
                waits_for += f" ({len(vanished)} of those it reaches vanished)"
        ratios = [one.loss_ratio for one in trials if one.loss_ratio is not None]
        reasons = Counter(one.reason.value for one in trials if one.reason is not None)
        return cls(
            mode=mode,
            coordinator_running=running,
            stable=store.stable_version(),
            newest=None if newest is None else newest.number,
            rollout=record,
            active=active,
            rolled_back=len(trials) - active,
            wanted=wanted,
            soak_left_s=soak_left_s,
            waits_for=waits_for,
            measured=len(ratios),
            loss_ratio=median(ratios) if ratios else None,
            reasons=dict(sorted(reasons.items())),
            vanished=vanished,
            trials=trials,
        )


def show(report: RolloutReport, *, as_json: bool) -> None:
    """One rollout: where it stands, its stages, and the devices that rolled it back."""
    if as_json:
        print_json(report)
        return
    serves = (
        f"each newest version is used by all devices (now {report.newest})"
        if report.stable is None
        else f"stable version {report.stable}, newest version {report.newest}"
    )
    console.print(f'mode "{report.mode.value}": {serves}')
    record = report.rollout
    if record is not None:
        console.print(
            f"rollout {record.number}: version {record.version} beside version {record.stable}, "
            f"{record.phase.value}, begun {utc_time(record.started_at)}"
            + (f", ended {utc_time(record.ended_at)}" if record.ended_at is not None else "")
            + (f" ({record.reason})" if record.reason else "")
        )
        _show_stages(record)
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
        console.print(
            f"devices: {record.reached} in the share, {report.active} {_active(record)}, "
            f"{report.rolled_back} rolled back" + (f" ({reasons})" if reasons else "")
        )
        if report.vanished:
            named = ", ".join(report.vanished[:MOST_DEVICES])
            more = len(report.vanished) - MOST_DEVICES
            console.print(
                f"vanished: {len(report.vanished)} gave no answer and were not seen for a day: "
                + named
                + (f" and {more} more" if more > 0 else "")
            )
        if report.trials:
            found = "" if report.loss_ratio is None else f", median {report.loss_ratio:.3f}"
            console.print(
                f"loss against the version in use: measured on {report.measured} of "
                f"{len(report.trials)} devices{found}"
            )
            if not report.measured:
                console.print(
                    "note: nobody has compared the losses: devices need hold_out in [data] or "
                    "[examples], and as many examples there as min_hold_out of [rollout] says"
                )
        console.print(f"waits for: {report.waits_for}")
        _show_devices([one for one in report.trials if one.reason is not None])
    else:
        console.print(f"waits for: {report.waits_for}")
    if not report.coordinator_running:
        console.print("no coordinator is running: nothing changes until `fedge serve` is started")


def show_all(
    records: Sequence[RolloutRecord],
    counts: Sequence[Mapping[TrialOutcome, int]],
    *,
    as_json: bool,
) -> None:
    """A line a rollout."""
    if as_json:
        print_json(
            [
                {"rollout": record, **{outcome.value: one[outcome] for outcome in TrialOutcome}}
                for record, one in zip(records, counts, strict=True)
            ]
        )
        return
    table = plain_table(
        "rollout", "version", "beside", "begun", "phase", "stage", "active", "rolled back", "reason"
    )
    for record, one in zip(records, counts, strict=True):
        table.add_row(
            str(record.number),
            str(record.version),
            str(record.stable),
            utc_time(record.started_at),
            record.phase.value,
            f"{record.stage + 1}/{len(record.terms.stages)}",
            str(one[TrialOutcome.ACTIVE]),
            str(one[TrialOutcome.ROLLED_BACK]),
            record.reason,
        )
    console.print(table)


def _among(
    state: Rollout, fleet: RolloutFleet, devices: Sequence[KnownDevice], now: float
) -> Rollout:
    # Everybody is known: nobody who asks has listened to the fleet for a day.
    return rollouts.counted(state, fleet.look(devices, now=now, listened_s=0.0))


def _active(record: RolloutRecord) -> str:
    taken_back = record.phase in (Phase.HALTED, Phase.ABORTED)
    return "active before it was taken back" if taken_back else "active"


def _show_stages(record: RolloutRecord) -> None:
    table = plain_table("stage", "share", "state")
    for index, share in enumerate(record.terms.stages):
        if index < record.stage or record.phase is Phase.DONE:
            state = "passed"
        elif index > record.stage:
            state = "-"
        else:
            state = f"{record.phase.value}, reaches {record.reached}"
        table.add_row(f"{index + 1}/{len(record.terms.stages)}", f"{100 * share:.4g}%", state)
    console.print(table)


def _show_devices(failed: Sequence[TrialRecord]) -> None:
    if not failed:
        return
    table = plain_table("device", "reason", "at", "detail")
    for one in failed[:MOST_DEVICES]:
        reason = "-" if one.reason is None else one.reason.value
        table.add_row(one.device, reason, utc_time(one.at), one.detail)
    console.print(table)
    if len(failed) > MOST_DEVICES:
        console.print(f"and {len(failed) - MOST_DEVICES} more: --json lists all")


def _waits_for(
    record: RolloutRecord,
    state: Rollout,
    wanted: int,
    soak_left_s: float | None,
    *,
    running: bool,
) -> str:
    if not record.phase.is_open:
        took_s = (record.ended_at or time.time()) - record.started_at
        return f"nothing: it is over, after {took_s:.0f} s"
    if WISHED[record.wish] is not record.phase:
        return "the coordinator, which was asked to " + _ASKED[record.wish]
    if record.phase is Phase.PAUSED:
        return "`fedge rollout resume`"
    if record.share == 0.0:
        return "the coordinator, to begin" if running else "a coordinator, to begin"
    last = record.stage == len(record.terms.stages) - 1
    then = "it is stable" if last else f"stage {record.stage + 2}"
    soak_s = record.terms.soak_s
    if soak_left_s is not None:
        return f"soaking: {soak_left_s:.0f} of {soak_s:.0f} s are left; then {then}"
    if state.answered < wanted:
        what = f"answers: {state.answered} of the {wanted} wanted"
    else:
        what = "a device that it reaches: none is connected, and time does not count"
    return f"{what}; then {soak_s:.0f} s of soaking, then {then}"
