"""The options that several of the device's commands share."""

from __future__ import annotations

from pathlib import Path

import click

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("agent.toml"),
    show_default=True,
    help="The agent's TOML file.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
