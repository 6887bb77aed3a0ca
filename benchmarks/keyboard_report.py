"""What `keyboard.py` says: sums made into shares, devices compared, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from keyboard_learning import Personal

FEW_WORDS = 100
"""A device with fewer words to test on says little by itself; it is counted all the same."""

Sums = Mapping[str, float]


def shares(sums: Sums) -> dict[str, float]:
    """Recalls over all words, perplexity over the known ones."""
    return {
        "top1": sums["first_hits"] / sums["all_words"],
        "top3": sums["three_hits"] / sums["all_words"],
        "perplexity": math.exp(sums["log_loss"] / max(sums["known_words"], 1.0)),
    }


def recalls(sums: Sums) -> dict[str, float]:
    """Of an n-gram, whose suggestions are measured and not its probabilities."""
    return {
        "top1": sums["first_hits"] / sums["all_words"],
        "top3": sums["three_hits"] / sums["all_words"],
    }


def summed(found: Mapping[str, Personal]) -> dict[str, Any]:
    """All devices together, and on how many of them the own copy is above, equal or below."""
    devices = [
        {
            "name": name,
            "words": one.after["all_words"],
            "epochs": one.epochs,
            "before": shares(one.before),
            "after": shares(one.after),
        }
        for name, one in found.items()
    ]
    large = [one for one in devices if one["words"] >= FEW_WORDS]
    return {
        **shares(added(one.after for one in found.values())),
        "fresh": shares(added(one.fresh for one in found.values())),
        "all_devices": compared(devices),
        f"devices_with_{FEW_WORDS}_words": compared(large),
        "devices": devices,
    }


def added(sums: Iterable[Sums]) -> dict[str, float]:
    """The sums over all devices."""
    total: dict[str, float] = {}
    for one in sums:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


def compared(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by measure, and the mean gain of a device, in the measure's own unit."""
    report: dict[str, Any] = {"devices": len(devices)}
    for name, sign in (("top1", 1), ("top3", 1), ("perplexity", -1)):
        gains = [sign * (one["after"][name] - one["before"][name]) for one in devices]
        report[name] = {
            "above": sum(gain > 0 for gain in gains),
            "equal": sum(gain == 0 for gain in gains),
            "below": sum(gain < 0 for gain in gains),
            "mean_gain": sum(gains) / max(len(gains), 1),
        }
    return report


def rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The table: what was reached, and beside it the goal or a remark."""
    table = [("", " top-1   top-3   fresh texts only   perplexity", "")]
    for method, one in found.items():
        remark = {
            "ngram": lambda one: f"order {one['order']}, the best of {list(one['by_order'])}",
            "own_ngram": lambda one: f"order {one['order']}, each device alone",
            "central": _passes_of,
            "central_sgd": _passes_of,
            "federated": _passes_of,
            "personal": lambda _: "each device's own copy, or the federated one",
        }[method](one)
        table.append((method, _numbers(one), remark))
    if {"central", "federated"} <= found.keys():
        for name in ("top1", "top3"):
            best, last = of_central(found, name), of_central(found, name, "at_last_pass")
            table.append(
                (f"federated of central, {name}", f"{best:.1%}",
                 f"goal: 97%; both after their last pass: {last:.1%}")
            )  # fmt: skip
    if "personal" in found:
        for group in ("all_devices", f"devices_with_{FEW_WORDS}_words"):
            one = found["personal"][group]
            for name in ("top1", "top3", "perplexity"):
                counts = one[name]
                share = counts["above"] / max(one["devices"], 1)
                table.append(
                    (f"personal above federated, {name}", f"{share:.0%} of {one['devices']}",
                     f"equal {counts['equal']}, below {counts['below']}, "
                     f"mean gain {counts['mean_gain']:+.4f} ({group.replace('_', ' ')})")
                )  # fmt: skip
    return table


def _numbers(one: Mapping[str, Any]) -> str:
    perplexity = f"{one['perplexity']:.1f}" if "perplexity" in one else "-"
    fresh = f"{one['fresh']['top1']:6.2%}  {one['fresh']['top3']:6.2%}"
    return f"{one['top1']:6.2%}  {one['top3']:6.2%}  {fresh}     {perplexity}"


def of_central(found: Mapping[str, Any], name: str, at: str | None = None) -> float:
    """The federated share of the better central training; nan where that found nothing.

    `at`: where the numbers stand, if not those of the best version.
    """
    reached = {
        method: (one if at is None else one[at])[name]
        for method, one in found.items()
        if method in ("central", "central_sgd", "federated")
    }
    federated = reached.pop("federated")
    central = max(reached.values())
    return float(federated / central) if central else math.nan


def _passes_of(one: Mapping[str, Any]) -> str:
    last = one["at_last_pass"]
    return (
        f"{one['passes']} passes, {one['windows_trained']} windows; best validation after "
        f"{one['best_passes']}; after the last: {last['top1']:.2%}, {last['top3']:.2%}"
    )
