"""How to train, as an assignment says it: apart from the training itself, which needs numpy."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedge.schemas.ids import Seed
from fedge.schemas.messages import Assignment


class TrainingSettings(BaseModel):
    """How to train: the hyperparameters of an assignment, with its limits.

    `local_steps`: stop after so many batches, within `local_epochs`. Either may be 0: no training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Seed
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    learning_rate: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
    local_epochs: Annotated[int, Field(ge=0, le=1000)]
    local_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None
    proximal_mu: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)] = 0.0

    @classmethod
    def of(cls, assignment: Assignment) -> TrainingSettings:
        """The settings that `assignment` gives."""
        return cls.model_validate(assignment.model_dump(include=set(cls.model_fields)))

    @property
    def asks_for_no_step(self) -> bool:
        """Whether there is nothing to train: the round measures its own cost."""
        return 0 in (self.local_epochs, self.local_steps)
