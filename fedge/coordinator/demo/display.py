"""Live progress on stderr: a table that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedge.coordinator.demo.progress import CROWD, Event, Progress, sentence
from fedge.schemas.measures import measure_text

RECENT_VERSIONS = 12


class Display(Protocol):
    """Shows progress while its context is open."""

    def __enter__(self) -> Self:
        """Begins to show."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves what was shown last, and stops."""
        ...

    def say(self, line: str) -> None:
        """Shows a line that stays."""
        ...

    def update(self, source: str, event: Event, progress: Progress) -> None:
        """Shows what an event changed; `progress` has taken it in."""
        ...


def open_display(console: Console) -> Display:
    """The display that suits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class PlainDisplay:
    """One line for each event that matters, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def say(self, line: str) -> None:
        """Shows a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, source: str, event: Event, progress: Progress) -> None:
        """Shows the event's sentence, if it has one."""
        line = sentence(source, event, len(progress.devices))
        if line is not None:
            self.say(line)


class LiveDisplay:
    """Devices and versions in a table that redraws itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._spinner = Spinner("dots")
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=8, transient=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """Shows a line above the table."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self, source: str, event: Event, progress: Progress) -> None:
        """Keeps the progress for the next redrawing; trouble becomes a line that stays."""
        self._progress = progress
        if event.get("level") in ("warning", "error"):
            line = sentence(source, event, len(progress.devices))
            if line is not None:
                self.say(line)

    def _render(self) -> RenderableType:
        elapsed = f"{time.monotonic() - self._started:5.1f} s"
        progress = self._progress
        if progress is None:
            return Group(self._heading("starting", elapsed))
        parts: list[RenderableType] = [self._heading(_phase(progress), elapsed)]
        made = max(progress.metrics, default=0)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=progress.final, completed=made, width=40),
            f"{made} of {progress.final} versions",
        )
        parts += [bar, "", _devices(progress)]
        if progress.metrics:
            parts += ["", _versions(progress)]
        return Padding(Group(*parts), (0, 0, 1, 0))

    def _heading(self, phase: str, elapsed: str) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        done = self._progress is not None and self._progress.finished
        grid.add_row("*" if done else self._spinner, Text(elapsed), Text(phase, style="bold"))
        return grid


def _phase(progress: Progress) -> str:
    if progress.finished:
        done = len(progress.central)
        beside = f"; {done} epochs of the central training are done" if done else ""
        return f"every device uses the last version{beside}"
    if progress.compiled_s is None:
        return "the coordinator compiles the plan (some seconds)"
    return progress.phase


def _devices(progress: Progress) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("device", "examples", "loss", "trained", "sent", "fetched", "uses", "now"):
        right = column not in ("device", "now")
        table.add_column(column, justify="right" if right else "left")
    for name, device in list(progress.devices.items())[:CROWD]:
        loss = device.losses[max(device.losses)] if device.losses else None
        table.add_row(
            name,
            "-" if device.examples is None else f"{device.examples:,}",
            "-" if loss is None else f"{loss:.4f}",
            f"{device.training_s:.1f} s",
            f"{device.uploaded_bytes / 1000:,.0f} kB",
            f"{device.downloaded_bytes / 1000:,.0f} kB",
            "-" if device.version is None else f"version {device.version}",
            device.doing,
        )
    if len(progress.devices) > CROWD:
        table.add_row(f"and {len(progress.devices) - CROWD} more")
    return table


def _versions(progress: Progress) -> Table:
    names = list(next(iter(progress.metrics.values())))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("version", justify="right")
    for name in names:
        table.add_column(f"test {name}", justify="right")
    for number in sorted(progress.metrics)[-RECENT_VERSIONS:]:
        found = progress.metrics[number]
        cells = (measure_text(name, found[name]) for name in names)
        table.add_row(str(number), *cells)
    return table
