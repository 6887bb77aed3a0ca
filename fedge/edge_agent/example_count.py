"""How many examples a device has: counted in the training process, which reads the files anyway."""

from __future__ import annotations

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.trainer.jobs import CountJob
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled
from fedge.schemas.errors import StoreError, TrainingFailed
from fedge.schemas.logs import EventLog

log = EventLog(__name__)

COUNT_TRIES = 3
"""For a training process that is killed while it counts."""


async def count_in(trainer: Trainer, device: str, data: DataConfig) -> int:
    """The examples to train on. 0 if they cannot be counted: that is logged, with the reason.

    Without its examples a device can still follow the versions and predict.
    """
    reason = ""
    for _ in range(COUNT_TRIES):
        try:
            examples = (await trainer.run(CountJob(data=data))).examples
        except TrainerKilled as error:
            reason = str(error)
        except (StoreError, TrainingFailed) as error:
            reason = str(error)
            break
        else:
            log.info("examples_counted", device=device, examples=examples)
            return examples
    log.error("examples_not_counted", device=device, reason=reason)
    return 0
