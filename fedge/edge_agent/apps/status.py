"""What an app is told of the device: facts that the agent has anyway, and never a text. Pure."""

from __future__ import annotations

from fedge.edge_agent.apps.contract import KeptTexts, Status, TrainingStatus
from fedge.edge_agent.eligibility import Standing
from fedge.edge_agent.machine import Agent


def status_of(
    device: str,
    population: str,
    *,
    state: Agent,
    standing: Standing | None,
    kept: KeptTexts | None,
    in_use: int | None,
) -> Status:
    """The status.

    `standing`: None where no rule applies, or before the first look. `in_use`: the version that
    answers. The rest as `Status` has it.
    """
    work = state.work
    return Status(
        device=device,
        population=population,
        version=in_use,
        newest=None if state.announced is None else state.announced.number,
        connected=state.connected,
        kept=kept,
        training=TrainingStatus(
            examples=state.examples,
            eligible=None if standing is None else standing.eligible,
            in_the_way=[] if standing is None else list(standing.reasons),
            round=None if work is None else work.assignment.round,
            stage=None if work is None else work.stage.value,
            unsent=len(state.outbox),
        ),
    )
