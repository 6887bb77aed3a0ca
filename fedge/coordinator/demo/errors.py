"""How a demonstration fails: one of its programs ended, or nothing useful can follow."""

from __future__ import annotations

from pathlib import Path

from fedge.schemas.errors import FedgeError


class DemoFailed(FedgeError):  # noqa: N818 -- the outcome of a run
    """The demonstration cannot reach its end; the message says why and what to do."""


class ProgramEnded(DemoFailed):
    """A program ended that should have gone on, or with an exit status other than 0.

    `tail`: the end of what it said. `returncode`: as in `subprocess`, negative for a signal.
    """

    def __init__(self, name: str, returncode: int, tail: str, log_path: Path) -> None:
        said = f"; the end of {log_path}:\n{tail}" if tail else f"; it said nothing ({log_path})"
        super().__init__(f"{name} {_how(returncode)}{said}")
        self.name = name
        self.returncode = returncode
        self.tail = tail
        self.log_path = log_path


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by signal {-returncode}"
    return f"ended with exit status {returncode}"
