"""`fedge-agent eligibility`: may this device train now, and if not, why.

Takes its own readings, beside a running agent or without one, and looks into the agent's ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedge.edge_agent.command_options import config_option, json_option

if TYPE_CHECKING:
    from fedge.edge_agent.eligibility import Finding
    from fedge.edge_agent.participation import Allowance
    from fedge.edge_agent.settings import Settings

# Imports below are inside the command, as in `fedge.edge_agent.cli`.

EXIT_NOT_ELIGIBLE = 3


@click.command()
@config_option
@json_option
def eligibility(config_path: Path, as_json: bool) -> None:
    """Say whether this device may train now: each rule, its reading, and what is used of a day.

    The rules are in [eligibility], the policies in [participation]. After a rule broke, a running
    agent waits for steady_for_s longer than this command. Free memory is without that of a training
    under way, which the agent adds.

    Exit status: 0 eligible, 3 not eligible, 1 failed, 2 asked wrongly.
    """
    from fedge.edge_agent.settings import load  # noqa: PLC0415 -- see above

    settings = load(config_path)
    found = _look(settings)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        click.echo("\n".join(found.lines()))
    if found.in_the_way:
        sys.exit(EXIT_NOT_ELIGIBLE)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the command says. `last_round`: the newest with an update of this device, 0: none."""

    settings: Settings
    findings: list[Finding]
    allowances: list[Allowance]
    last_round: int
    next_round: int

    @property
    def in_the_way(self) -> list[str]:
        found = [finding.reason for finding in self.findings if not finding.holds]
        return found + [one.reason for one in self.allowances if not one.holds]

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.settings.device,
            "eligible": not self.in_the_way,
            "reasons": self.in_the_way,
            "rules": [asdict(finding) for finding in self.findings],
            "policies": [asdict(allowance) for allowance in self.allowances],
            "last_round": self.last_round,
            "next_round": self.next_round,
            "sampling_period_rounds": self.settings.participation.sampling_period_rounds,
        }

    def lines(self) -> Iterator[str]:
        policies = self.settings.participation
        if self.settings.eligibility is None:
            yield "no table [eligibility]: the state of the host does not matter"
        for one in self.findings:
            yield f"{_word(one.holds):4} {_told(one)}"
        for allowance in self.allowances:
            yield f"{_word(allowance.holds):4} {allowance.reason}"
        if policies.every_rounds > 1 and self.last_round > 0:
            yield f"     every_rounds: last in round {self.last_round}, next from {self.next_round}"
        if policies.sampling_period_rounds > 1:
            yield f"     sampling_period_rounds: one round in {policies.sampling_period_rounds}"
        reasons = "; ".join(self.in_the_way)
        yield f"not eligible: {reasons}" if reasons else "eligible"


def _told(finding: Finding) -> str:
    if not finding.known:
        taken = "allowed" if finding.holds else "refused"
        return f"{finding.rule}: not known ({finding.note}); so training is {taken}"
    note = f" ({finding.note})" if finding.note else ""
    return f"{finding.rule}: {finding.reading}{note}, wanted {finding.wanted}"


def _look(settings: Settings) -> _Found:
    from fedge.edge_agent.participation import first_round_after  # noqa: PLC0415 -- see above

    findings = asyncio.run(_findings(settings))
    allowances, last_round = _policies(settings)
    next_round = first_round_after(last_round, settings.participation.every_rounds)
    return _Found(settings, findings, allowances, last_round, next_round)


async def _findings(settings: Settings) -> list[Finding]:
    from fedge.edge_agent.eligibility import local_time, look_at  # noqa: PLC0415 -- see above
    from fedge.edge_agent.host.reader import HostReader  # noqa: PLC0415 -- see above

    rules = settings.eligibility
    if rules is None:
        return []
    readings = await HostReader(rules, wall_clock=time.time).read()
    return look_at(rules, readings, local_time(time.time()))


def _policies(settings: Settings) -> tuple[list[Allowance], int]:
    """What is used of the limits, and the last round that this device made an update for."""
    from fedge.edge_agent.participation import DAY_S, allowances  # noqa: PLC0415 -- see above
    from fedge.edge_agent.state import AgentState  # noqa: PLC0415 -- see above

    now_s = time.time()
    with contextlib.closing(AgentState(settings.state_dir / "agent.sqlite")) as memory:
        used, last_round = memory.usage(now_s - DAY_S), memory.newest_round()
    found = allowances(settings.participation, used, _examples(settings), now_s)
    return found, last_round


def _examples(settings: Settings) -> int | None:
    """How many there are, if a policy asks; None if none asks."""
    if settings.participation.minimum_examples == 1:
        return None
    if settings.data is None:
        return 0
    from fedge.edge_agent.data.examples import count_examples  # noqa: PLC0415 -- see above

    return count_examples(settings.data).training


def _word(holds: bool) -> str:
    return "yes" if holds else "no"
