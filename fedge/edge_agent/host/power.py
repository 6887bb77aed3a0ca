"""External power and the battery, from the kernel's power supplies.

Linux' `/sys/class/power_supply` has one folder for each supply (Documentation/ABI/testing/
sysfs-class-power). Batteries of mice and keyboards are there too: their `scope` is `Device`, and
they say nothing of the host. A host without a battery of its own is on mains. Elsewhere psutil
answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedge.edge_agent.eligibility import Reading

SUPPLIES = Path("/sys/class/power_supply")

_MAINS_ONLY = "no battery here: on mains"


def power_readings(supplies: Path = SUPPLIES) -> tuple[Reading, Reading]:
    """Whether the host is on external power, and its charge from 0 to 1."""
    if sys.platform != "linux":
        return _from_psutil()
    found = [_attributes(folder) for folder in _folders(supplies)]
    found = [one for one in found if one.get("scope") != "Device"]
    batteries = [one for one in found if one.get("type") == "Battery"]
    if not batteries:
        return Reading(value=True, note=_MAINS_ONLY), Reading(1.0, _MAINS_ONLY)
    lines = [one["online"] for one in found if one.get("type") != "Battery" and "online" in one]
    return _external(lines, {one.get("status", "") for one in batteries}), _charge(batteries)


def _external(lines: list[str], statuses: set[str]) -> Reading:
    if any(online not in ("0", "") for online in lines) or "Charging" in statuses:
        return Reading(value=True)
    if lines or "Discharging" in statuses:
        return Reading(value=False)
    # Neither charging nor discharging, and no line that says more: it is kept full.
    if statuses & {"Full", "Not charging"}:
        return Reading(value=True)
    return Reading(None, f"the battery's status is {', '.join(sorted(statuses)) or 'not told'}")


def _charge(batteries: list[dict[str, str]]) -> Reading:
    # Of several batteries the mean: each is used up in its turn.
    told = [one["capacity"] for one in batteries if one.get("capacity", "").isdigit()]
    if not told:
        return Reading(None, "the battery does not tell its charge")
    return Reading(min(sum(int(text) for text in told) / len(told) / 100, 1.0))


def _folders(supplies: Path) -> list[Path]:
    try:
        return sorted(supplies.iterdir())
    except OSError:
        # The kernel of a host without any has no such folder.
        return []


def _attributes(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("type", "scope", "online", "status", "capacity"):
        try:
            found[name] = (folder / name).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            # A supply has those attributes that it has; some fail while the hardware sleeps.
            continue
    return found


def _from_psutil() -> tuple[Reading, Reading]:
    import psutil  # noqa: PLC0415 -- loaded only where a rule needs it

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return Reading(value=True, note=_MAINS_ONLY), Reading(1.0, _MAINS_ONLY)
    plugged = battery.power_plugged
    external = Reading(None, "the system does not tell") if plugged is None else Reading(plugged)
    return external, Reading(battery.percent / 100)
