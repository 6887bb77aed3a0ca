"""Aftercare: what is done for a version once it is out, and nobody waits for.

It is measured, if there is a test set; older versions are taken back from the broker; what the
operator does not want kept is deleted. Each may fail without harm: what is to be deleted is deleted
in the next version's turn, and a version that could not be measured has no measures.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fedge.coordinator.distribution import Distribution
from fedge.coordinator.store import Retention, Store, VersionRecord
from fedge.coordinator.succession import Succession
from fedge.coordinator.workers import Workers
from fedge.schemas.errors import FedgeError, StoreError
from fedge.schemas.logs import EventLog

if TYPE_CHECKING:
    from fedge.coordinator.evaluation import Evaluation  # loads onnxruntime

    Evaluate = Callable[[VersionRecord], Evaluation]

log = EventLog(__name__)


class Aftercare:
    """Measures and tidies, version by version.

    `evaluate`: measures a version, or None where there is no test set; `evaluate_every`: only
    versions whose number it divides. `keep_devices`: told the names that are left when some were
    forgotten. `start`: runs work beside everything else. `wall_clock`: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        store: Store,
        workers: Workers,
        distribution: Distribution,
        succession: Succession,
        retention: Retention | None,
        evaluate: Evaluate | None,
        evaluate_every: int,
        keep_devices: Callable[[frozenset[str]], None],
        start: Callable[[Coroutine[Any, Any, Any], str], None],
        wall_clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._workers = workers
        self._distribution = distribution
        self._succession = succession
        self._retention = retention
        self._evaluate = evaluate
        self._evaluate_every = evaluate_every
        self._keep_devices = keep_devices
        self._start = start
        self._wall_clock = wall_clock
        self._forgotten = False

    def published(self, version: VersionRecord) -> None:
        """A version is out for the first time in this process's life."""
        due = version.number % self._evaluate_every == 0
        if self._evaluate is not None and due and "loss" not in version.metrics:
            self._start(self._measure(version, self._evaluate), f"measure-{version.number}")
        self._start(self._clean_up(version), f"clean-up-{version.number}")

    async def _measure(self, version: VersionRecord, evaluate: Evaluate) -> None:
        try:
            found = await self._workers.measure(lambda: evaluate(version))
        except FedgeError as error:
            log.error("evaluation_failed", version=version.number, reason=str(error))
            return
        metrics = {"loss": found.loss, **found.metrics}
        await self._workers.durable(lambda: self._store.record_metrics(version.number, metrics))
        self._succession.measured(replace(version, metrics=metrics))
        log.info("version_evaluated", version=version.number, examples=found.examples, **metrics)

    async def _clean_up(self, newest: VersionRecord) -> None:
        await self._distribution.clear_before(newest)
        if self._retention is None:
            return
        retention = self._retention
        try:
            collected = await self._workers.measure(
                lambda: self._store.collect(retention, now=self._wall_clock())
            )
        except StoreError as error:
            log.error("not_collected", reason=str(error))
            return
        if collected.bytes_freed:
            log.info("collected", **asdict(collected))
        self._forgotten = self._forgotten or collected.devices > 0
        if self._forgotten:
            known = await self._workers.durable(self._store.devices)
            self._forgotten = False
            self._keep_devices(frozenset(device.name for device in known))
