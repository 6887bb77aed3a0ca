"""The central training of a demonstration as a program, so that it can run beside and be ended.

    python -m fedge.coordinator.demo.central --task … --data FOLDER --epochs N …

It writes a `central_epoch` event after each epoch.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from fedge.coordinator.centralized import train_centrally
from fedge.coordinator.demo.examples import TEST_FILE, TRAIN_FILE
from fedge.coordinator.evaluation import Evaluation
from fedge.coordinator.task import load_task
from fedge.coordinator.testset import load_test_set
from fedge.schemas.logs import EventLog, set_up_logging
from fedge.schemas.process import errors_as_exit_status

log = EventLog("fedge.coordinator.demo.central")


@click.command()
@click.option("--task", "reference", required=True)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--epochs", type=int, required=True)
@click.option("--batch-size", type=int, required=True)
@click.option("--learning-rate", type=float, required=True)
@click.option("--seed", type=int, required=True)
def main(
    *, reference: str, data: Path, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """Trains the task on `data`/train.npz and evaluates it on `data`/test.npz."""
    set_up_logging("json")
    epochs_done = itertools.count(1)

    def say(found: Evaluation) -> None:
        metrics = {"loss": found.loss, **found.metrics}
        log.info("central_epoch", epoch=next(epochs_done), **metrics)

    with errors_as_exit_status():
        train_centrally(
            load_task(reference),
            load_test_set(data / TRAIN_FILE),
            load_test_set(data / TEST_FILE),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            on_epoch=say,
        )


if __name__ == "__main__":
    main()
