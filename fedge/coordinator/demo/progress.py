"""What is known of a running demonstration, put together from the log events of its programs.

Pure: events in, facts out. It decides when the run has reached its end and when it never will; the
display reads it, the runner waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedge.schemas.measures import measure_text

Event = Mapping[str, Any]

COORDINATOR, CENTRAL, BROKER = "coordinator", "central", "broker"

CROWD = 16
"""More devices than this are told of together: a line a round, not a line a device."""
MAX_ABANDONED = 3
"""Rounds abandoned one after another: what stopped these will stop the next."""

_NOT_METRICS = frozenset({"ts", "level", "event", "version", "epoch", "examples"})


@dataclass(slots=True)
class DeviceProgress:
    """One device as far as its own log and the coordinator's tell."""

    doing: str = "starting"
    examples: int | None = None
    version: int | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """Of its training, by round."""
    training_s: float = 0.0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0


@dataclass(slots=True)
class Progress:
    """The whole run. `final`: the number of the last version.

    `problem`: why the end cannot be reached any more. `metrics`: of each evaluated version, by
    name, `loss` among them; `central`: the same after each epoch of the central training.
    """

    devices: dict[str, DeviceProgress]
    final: int
    phase: str = "starting"
    round: int | None = None
    compiled_s: float | None = None
    graphs_bytes: int | None = None
    published_bytes: int = 0
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    central: dict[int, dict[str, float]] = field(default_factory=dict)
    goal_reached: bool = False
    abandoned: list[str] = field(default_factory=list)
    problem: str | None = None

    @classmethod
    def of(cls, devices: Iterable[str], final: int) -> Progress:
        """Before anything happened."""
        return cls({name: DeviceProgress() for name in devices}, final)

    @property
    def finished(self) -> bool:
        """Whether the last version was made and evaluated, and every device uses it."""
        everywhere = all(device.version == self.final for device in self.devices.values())
        return self.goal_reached and self.final in self.metrics and everywhere

    def observe(self, source: str, event: Event) -> None:
        """Takes in one event of one program. What means nothing here changes nothing."""
        if source == COORDINATOR:
            self._from_coordinator(event)
        elif source == CENTRAL and event["event"] == "central_epoch":
            self.central[event["epoch"]] = _metrics(event)
        elif source in self.devices:
            self._from_device(source, self.devices[source], event)

    def _from_coordinator(self, event: Event) -> None:  # noqa: PLR0912 -- one case for each event
        device = self.devices.get(event.get("device", ""))
        match event["event"]:
            case "plan_compiled":
                self.compiled_s, self.graphs_bytes = event["seconds"], event["graphs_bytes"]
            case "device_online" if device is not None and device.doing == "starting":
                device.doing = "online"
            case "round_gathering":
                self.round, self.phase = event["round"], f"round {event['round']}"
            case "update_accepted" if device is not None:
                device.doing = "sent its update"
                device.uploaded_bytes += event["bytes"]
                if event["loss"] is not None:
                    device.losses[event["round"]] = event["loss"]
            case "version_made":
                self.abandoned.clear()
            case "version_published":
                self.published_bytes = event["published_bytes"]
            case "version_evaluated":
                self.metrics[event["version"]] = _metrics(event)
            case "goal_reached":
                self.goal_reached, self.phase = True, "the devices take the last version"
            case "round_abandoned":
                self.abandoned.append(event["reason"])
                if len(self.abandoned) >= MAX_ABANDONED:
                    self.problem = f"{MAX_ABANDONED} rounds were abandoned: {event['reason']}"
            case "evaluation_failed":
                self.problem = f"version {event['version']} was not evaluated: {event['reason']}"
            case "version_refused":
                self.problem = f"no version came from round {event['round']}: {event['reason']}"

    def _from_device(self, name: str, device: DeviceProgress, event: Event) -> None:
        match event["event"]:
            case "examples_counted":
                device.examples = event["examples"]
            case "version_fetched":
                device.downloaded_bytes = event["received_bytes"]
                if event["version"] < self.final:
                    device.doing = "trains"
            case "trained":
                device.doing = "sends its update"
                device.training_s += event["training_s"]
            case "version_activated":
                device.version = event["version"]
                if event["version"] == self.final:
                    device.doing = "done"
            case "training_failed":
                self.problem = f"{name} could not train: {event['reason']}"
            case "version_refused":
                self.problem = f"{name} refused version {event['version']}: {event['reason']}"


def sentence(source: str, event: Event, devices: int = 1) -> str | None:  # noqa: PLR0911 -- as above
    """The event as a line for people, None for what would only be noise.

    `devices`: in all; of a `CROWD` no single one's work is told.
    """
    match source, event["event"]:
        case "coordinator", "update_accepted" if devices > CROWD:
            return None
        case "coordinator", "version_made" if devices > CROWD and "updates" in event:
            return (
                f"round {event['round']:<3} {event['updates']} updates from "
                f"{event['examples']:,} examples"
            )
        case "broker", "broker_ready":
            return None  # its notice is said once, by the runner
        case "coordinator", "plan_compiled":
            return (
                f"plan      {event['graphs_bytes'] / 1000:.1f} kB of ONNX graphs, compiled in "
                f"{event['seconds']:.1f} s"
            )
        case "coordinator", "update_accepted":
            loss = "" if event["loss"] is None else f"  loss {event['loss']:.4f}"
            return (
                f"round {event['round']:<3} {event['device']}{loss}  {event['examples']} examples  "
                f"{event['training_s']:.2f} s  {event['bytes']:,} bytes"
            )
        case "coordinator", "version_evaluated":
            numbers = "  ".join(
                f"{name} {measure_text(name, value)}" for name, value in _metrics(event).items()
            )
            return f"version {event['version']:<2} {numbers}"
        case "coordinator", "round_abandoned":
            return f"round {event['round']:<3} abandoned: {event['reason']}"
        case _, _ if event.get("level") in ("warning", "error"):
            facts = ", ".join(
                f"{name} {value}"
                for name, value in event.items()
                if name not in ("ts", "level", "event", "traceback")
            )
            return f"{source}: {event['event']} {facts}"
    return None


def _metrics(event: Event) -> dict[str, float]:
    return {name: value for name, value in event.items() if name not in _NOT_METRICS}
