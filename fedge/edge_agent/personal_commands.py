"""`fedge-agent personal`: whether this device has a model of its own, and what it is worth.

Each command reads the state folder, beside a running agent or without one.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedge.edge_agent.command_options import config_option, json_option
from fedge.schemas.errors import ConfigError

if TYPE_CHECKING:
    from fedge.edge_agent.library import Active, Library
    from fedge.edge_agent.personal_models import HeldOutSums, PersonalRecord
    from fedge.edge_agent.settings import Settings
    from fedge.schemas.plan import PlanManifest

# Imports below are inside the commands, as in `fedge.edge_agent.cli`.


@click.group()
def personal() -> None:
    """Show or forget this device's own model; see which layers there are to train.

    With a table [personalisation] in the configuration, the agent fine-tunes each version for this
    device when it has nothing else to do, and answers with what came of it if that is better on
    the examples that it never trains on. It is never sent anywhere.
    """


@personal.command()
@config_option
@json_option
def status(config_path: Path, as_json: bool) -> None:
    """Say what answers, and what the last personal training came to.

    Both models were measured on the same examples, which neither was trained on; the one with the
    lower loss answers, whatever became of the other measures.
    """
    settings, library = _opened(config_path)
    serving, record = library.serving(), library.personal.record()
    manifest = None if record is None else _plan_of(library, record)
    if as_json:
        click.echo(json.dumps(_as_dict(settings, serving, record, manifest)))
    else:
        click.echo("\n".join(_lines(settings, serving, record, manifest)))


@personal.command()
@config_option
def forget(config_path: Path) -> None:
    """Delete this device's own model; the version itself answers from now on.

    A running agent makes another one from the examples that there are. To stop that, take
    [personalisation] out of the configuration and start the agent anew.
    """
    _, library = _opened(config_path)
    library.personal.forget()


@personal.command()
@config_option
@json_option
def layers(config_path: Path, as_json: bool) -> None:
    """List the layers of the model, and which of them [personalisation] trains.

    `layers = 2` in that table trains the last two of this list; a list of patterns trains the
    tensors whose names match one: `layers = ["head.*"]`.
    """
    from fedge.edge_agent.layers import fixed_weights, layers_of  # noqa: PLC0415 -- see above
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- see above

    settings, library = _opened(config_path)
    active = library.active()
    if active is None:
        raise ConfigError("no version is in use yet: run `fedge-agent run` until one was fetched")
    manifest = PlanManifest.decode(library.blobs.read(active.manifest.name))
    own = settings.personalisation
    fixed = fixed_weights(manifest, "all" if own is None else own.layers)
    found: list[dict[str, Any]] = [
        {
            "layer": layer.name,
            "tensors": [w.tensor.name for w in layer.weights],
            "parameters": layer.parameter_count,
            "trained": [w.tensor.name for w in layer.weights if w.tensor.name not in fixed],
        }
        for layer in layers_of(manifest)
    ]
    if as_json:
        click.echo(json.dumps({"version": active.version, "layers": found}))
        return
    for one in found:
        for name in one["tensors"]:
            mark = "trained" if name in one["trained"] else "fixed"
            click.echo(f"{mark:<8} {name}")


def _opened(config_path: Path) -> tuple[Settings, Library]:
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- see above
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- see above

    settings = load(config_path)
    return settings, Library(settings.state_dir)


def _plan_of(library: Library, record: PersonalRecord) -> PlanManifest | None:
    """None if its blobs are not here any more."""
    from fedge.schemas.plan import PlanManifest  # noqa: PLC0415 -- see above

    if not library.blobs.has(record.plan_sha256):
        return None
    return PlanManifest.decode(library.blobs.read(record.plan_sha256))


def _measured(sums: HeldOutSums | None, manifest: PlanManifest | None) -> dict[str, float] | None:
    """Means and ratios, the loss first."""
    if sums is None:
        return None
    own = {} if manifest is None else manifest.measured(sums.metrics, sums.rows)
    return {"loss": sums.loss_sum / sums.rows, **own}


def _as_dict(
    settings: Settings,
    serving: Active | None,
    record: PersonalRecord | None,
    manifest: PlanManifest | None,
) -> dict[str, Any]:
    last = None
    if record is not None:
        last = {
            "version": record.version,
            "outcome": record.outcome,
            "reason": record.reason or None,
            "at": record.at,
            "training": record.training,
            "hold_out": record.hold_out,
            "steps": record.steps,
            "training_s": record.training_s,
            "common": _measured(record.common, manifest),
            "personal": _measured(record.personal, manifest),
        }
    return {
        "device": settings.device,
        "switched_on": settings.personalisation is not None,
        "version": None if serving is None else serving.version,
        "personal": serving is not None and serving.personal,
        "model": None if serving is None else str(serving.model),
        "last": last,
    }


def _not_yet(settings: Settings) -> str:
    data, said = settings.data, "no personal training yet"
    if settings.personalisation is None:
        return said
    if data is None or not (settings.examples.hold_out if data.is_store else data.hold_out):
        table = "[examples]" if data is None or data.is_store else "[data]"
        return f"{said}: nothing is held out to compare on; set hold_out in {table}"
    return f"{said}: the agent's log says what it waits for (personal_waits)"


def _lines(
    settings: Settings,
    serving: Active | None,
    record: PersonalRecord | None,
    manifest: PlanManifest | None,
) -> list[str]:
    on = "on" if settings.personalisation is not None else "off: no [personalisation]"
    if serving is None:
        answers = "nothing yet: no version is in use"
    else:
        whose = "this device's own model of version" if serving.personal else "version"
        answers = f"{whose} {serving.version}  {serving.model}"
    lines = [f"personal   {on}", f"answers    {answers}"]
    if record is None:
        return [*lines, f"last       {_not_yet(settings)}"]
    when = datetime.fromtimestamp(record.at).astimezone().isoformat(" ", "seconds")
    outcome = {"better": "better by loss", "not better": "not better by loss"}
    said = outcome.get(str(record.outcome), str(record.outcome))
    lines.append(f"last       version {record.version}: {said}, {when}")
    if record.outcome == "failed":
        return [*lines, f"reason     {record.reason}"]
    lines.append(
        f"examples   {record.training} to train on, {record.hold_out} held out, "
        f"{record.steps} steps in {record.training_s:.1f} s"
    )
    common, own = _measured(record.common, manifest), _measured(record.personal, manifest)
    if common is not None and own is not None:
        both = [name for name in common if name in own]
        width = max(10, *map(len, both))
        lines += [f"{name:<{width}} {common[name]:.4g} -> {own[name]:.4g}" for name in both]
    return lines
