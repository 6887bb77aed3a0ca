"""`fedge-agent type`: try the suggestions of the version in use, as one types."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from fedge.edge_agent.command_options import config_option
from fedge.schemas.errors import ConfigError

# Imports below are inside the command, as in `fedge.edge_agent.cli`.


@click.command("type")
@config_option
@click.option("--keep", is_flag=True, help="Keep each line on this device, to learn from.")
def type_in_terminal(config_path: Path, keep: bool) -> None:
    """A keyboard in the terminal: shows what this device suggests, while you type.

    \b
    Tab or F1      take the first suggestion
    F2, F3         take the second, the third (or Alt-2, Alt-3)
    Enter          end the line
    Ctrl-D         leave

    Suggestions come from the version in use, and from the next one as soon as there is one. Lines
    are forgotten, unless --keep gives them to this device's example store. Nothing is sent.

    Needs a terminal, and the package prompt_toolkit: pip install 'fedge[terminal]'.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "`fedge-agent type` is for people at a terminal, and its input or output is none: ask "
            "with `fedge-agent predict`"
        )
    if importlib.util.find_spec("prompt_toolkit") is None:
        raise ConfigError(
            "`fedge-agent type` needs prompt_toolkit, which is not installed: "
            "pip install 'fedge[terminal]'"
        )
    from fedge.edge_agent.example_store import (  # noqa: PLC0415 -- see above
        FILE_NAME,
        ExampleStore,
    )
    from fedge.edge_agent.keyboard import Keyboard  # noqa: PLC0415 -- see above
    from fedge.edge_agent.library import Library  # noqa: PLC0415 -- see above
    from fedge.edge_agent.serving import Served  # noqa: PLC0415 -- see above
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- see above

    settings = load(config_path)
    with ExitStack() as stack:
        store: ExampleStore | None = None
        if keep:
            # Opened now: what is wrong with it is said before somebody has typed.
            path = settings.state_dir / FILE_NAME
            store = stack.enter_context(ExampleStore(path, settings.examples.limits))
        served = stack.enter_context(Served(Library(settings.state_dir)))
        Keyboard(served, None if store is None else store.add).run()
