"""What the operator's commands print: tables for people, JSON for scripts, of the same records."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedge.coordinator.buffer import staleness_weight
from fedge.coordinator.rounds import Mode
from fedge.coordinator.store import (
    DeviceRecord,
    ParticipantRecord,
    RoundRecord,
    RoundReport,
    VersionRecord,
)
from fedge.schemas.plan import PlanManifest

# Names, details and versions come from devices: nothing in them is markup.
# What goes into a pipe is for `grep`: no line is cut there.
console = Console(
    highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 1000
)


def show_versions(versions: Sequence[VersionRecord], *, as_json: bool) -> None:
    """A line a version."""
    if as_json:
        print_json(versions)
        return
    names = sorted({name for version in versions for name in version.metrics})
    table = plain_table("version", "base", "round", "made", *names, "weights", "model.onnx", "note")
    for version in versions:
        table.add_row(
            str(version.number),
            _or_dash(version.base),
            _or_dash(version.round),
            utc_time(version.created_at),
            *(_number(version.metrics.get(name)) for name in names),
            f"{version.weights.size_bytes:,} B" if version.files_kept else "deleted",
            f"{version.model_bytes:,} B",
            version.note,
        )
    console.print(table)


def show_version(version: VersionRecord, manifest: PlanManifest | None, *, as_json: bool) -> None:
    """Everything about one version. `manifest`: of its plan, None if it cannot be read."""
    if as_json:
        print_json(version)
        return
    facts = {
        "version": str(version.number),
        "made": utc_time(version.created_at),
        "base": _or_dash(version.base),
        "round": _or_dash(version.round),
        "plan": version.plan_sha256,
        "weights": f"{version.weights.sha256}  {version.weights.size_bytes:,} bytes",
        "model.onnx": f"{version.model_sha256}  {version.model_bytes:,} bytes",
        **_quantization_told(manifest),
        "files": "kept" if version.files_kept else "deleted, as [retention] says",
        "note": version.note or "-",
        **{name: _number(value) for name, value in version.metrics.items()},
    }
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        console.print(f"{name:<{width}}{value}")


def _quantization_told(manifest: PlanManifest | None) -> dict[str, str]:
    if manifest is None or manifest.quantization is None:
        return {}
    int8 = manifest.quantization.int8
    names = [weight.tensor.name for weight in manifest.weights if weight.tensor.name not in int8]
    return {"int8": ", ".join(int8) or "-", "float32": ", ".join(names) or "-"}


def show_rounds(rounds: Sequence[RoundRecord], *, as_json: bool) -> None:
    """A line a round."""
    if as_json:
        print_json(rounds)
        return
    table = plain_table("round", "base", "opened", "took", "outcome", "version", "reason")
    for record in rounds:
        table.add_row(
            str(record.number),
            str(record.base),
            utc_time(record.opened_at),
            _duration(record),
            _outcome(record),
            _or_dash(record.version),
            record.reason,
        )
    console.print(table)


def show_round(report: RoundReport, *, as_json: bool) -> None:
    """One round: its devices, then what was refused."""
    if as_json:
        print_json(report)
        return
    record = report.round
    console.print(
        f"round {record.number}: {_outcome(record)} from version {record.base}"
        + (f", made version {record.version}" if record.version is not None else "")
        + (f" ({record.reason})" if record.reason else "")
    )
    console.print(f"goal {record.goal}, quorum {record.quorum}, took {_duration(record)}")
    if record.mode == Mode.ASYNC.value:
        _show_buffer(report)
    table = plain_table("device", "status", "examples", "loss", "training", "bytes", "reason")
    for participant in report.participants:
        table.add_row(*_participant_cells(participant))
    console.print(table)
    if not record.details_kept:
        console.print("its devices and refusals were deleted, as [retention] says")
    if report.refusals:
        console.print("refused:")
        refused = plain_table("device", "reason", "count", "latest")
        for refusal in report.refusals:
            refused.add_row(
                refusal.device or "-", refusal.reason.value, str(refusal.count), refusal.last_detail
            )
        console.print(refused)


def _show_buffer(report: RoundReport) -> None:
    """In asynchronous mode work outlives the round that asked for it."""
    record = report.round
    made = "its version" if record.version is None else f"version {record.version}"
    console.print(f"in {made}, {len(report.counted)} updates:")
    counted = plain_table("device", "asked in", "base", "versions behind", "weight")
    for one in report.counted:
        behind = 0 if one.base is None else record.base - one.base
        counted.add_row(
            one.device,
            str(one.round),
            _or_dash(one.base),
            str(behind),
            f"{staleness_weight(behind):.3f}",
        )
    console.print(counted)
    console.print(
        "asked in this round; their updates count in the version that is open when they come:"
    )


def show_devices(devices: Sequence[DeviceRecord], *, as_json: bool) -> None:
    """A line a device."""
    if as_json:
        print_json(devices)
        return
    table = plain_table("device", "state", "version", "examples", "boot", "agent", "last seen")
    for device in devices:
        table.add_row(
            device.name,
            "online" if device.online else "offline",
            _or_dash(device.version),
            _or_dash(device.examples),
            _or_dash(device.boot),
            device.agent_version or "-",
            utc_time(device.last_seen_at),
        )
    console.print(table)


def _participant_cells(participant: ParticipantRecord) -> list[str]:
    reason = participant.reason.value if participant.reason is not None else ""
    told = f"{reason}: {participant.detail}" if reason else participant.detail
    made = participant.contribution
    if made is None:
        return [participant.device, participant.status.value, "-", "-", "-", "-", told]
    return [
        participant.device,
        participant.status.value,
        str(made.examples),
        _number(made.loss.by_epoch[-1] if made.loss.by_epoch else None),
        f"{made.training_s:.2f} s",
        f"{made.update.size_bytes:,}",
        told,
    ]


class _PlainTable(Table):
    """A table whose cells are text, whatever brackets and control characters they hold."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Adds a row of plain text."""
        clean = (Text("".join(c if c.isprintable() else "?" for c in str(cell))) for cell in cells)
        super().add_row(*clean, **options)


def plain_table(*columns: str) -> Table:
    """A table with these headings, whose cells are text."""
    table = _PlainTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _outcome(record: RoundRecord) -> str:
    return record.phase.value if record.outcome is None else record.outcome.value


def _duration(record: RoundRecord) -> str:
    return "-" if record.closed_at is None else f"{record.closed_at - record.opened_at:.1f} s"


def utc_time(seconds: float) -> str:
    """A moment in seconds since the epoch, for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def print_json(record: object) -> None:
    """Records as JSON, field by field. What is no number or infinite is null: JSON has neither."""
    print(json.dumps(_plain(record), indent=2, allow_nan=False))  # noqa: T201 -- the command's output


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    match value:
        case BaseModel():
            return _plain(value.model_dump(mode="json"))
        case Enum():
            return value.value
        case Mapping():
            return {str(name): _plain(one) for name, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case _:
            return None if isinstance(value, float) and not math.isfinite(value) else value
