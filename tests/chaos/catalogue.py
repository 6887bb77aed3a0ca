"""Every kind of fault, by name."""

from __future__ import annotations

from tests.chaos import host_faults, network_faults, process_faults, stranger_faults
from tests.chaos.fault import Fault

FAULTS: tuple[type[Fault], ...] = (
    network_faults.Slow,
    network_faults.Narrow,
    network_faults.Silent,
    network_faults.Stalled,
    network_faults.Reset,
    network_faults.Cut,
    network_faults.Refused,
    network_faults.HalfOpen,
    network_faults.Swallowed,
    network_faults.Doubled,
    network_faults.Belated,
    process_faults.CoordinatorKilled,
    process_faults.AgentKilled,
    process_faults.TrainerKilled,
    process_faults.CoordinatorRestarted,
    process_faults.AgentRestarted,
    process_faults.CoordinatorFrozen,
    process_faults.AgentFrozen,
    process_faults.TrainerFrozen,
    process_faults.BrokerFrozen,
    process_faults.BrokerKilled,
    host_faults.CoordinatorDiskFull,
    host_faults.AgentDiskFull,
    host_faults.CoordinatorDiskReadOnly,
    host_faults.AgentDiskReadOnly,
    host_faults.ClockJumps,
    host_faults.ClockWrongAfterPowerCut,
    stranger_faults.Garbage,
    stranger_faults.Flood,
    stranger_faults.Replay,
    stranger_faults.Impersonation,
    stranger_faults.Silence,
    stranger_faults.Lying,
)

BY_NAME = {fault.name: fault for fault in FAULTS}


def chosen(names: str | None) -> tuple[type[Fault], ...]:
    """The faults that `--only` names: whole names or beginnings, with commas; a `-` leaves out.

    Raises `ValueError` for a name that fits none.
    """
    wanted = [each.strip() for each in (names or "").split(",") if each.strip()]
    without = tuple(each[1:] for each in wanted if each.startswith("-"))
    only = tuple(each for each in wanted if not each.startswith("-"))
    for each in (*only, *without):
        if not any(name.startswith(each) for name in BY_NAME):
            raise ValueError(f"no fault begins with {each!r}; there are: {', '.join(BY_NAME)}")
    return tuple(
        fault
        for name, fault in BY_NAME.items()
        if (not only or name.startswith(only)) and not (without and name.startswith(without))
    )
