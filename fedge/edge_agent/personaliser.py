"""The device's own model: fine-tuned when there is nothing else to do, kept if it is better here.

The shell around `fedge.edge_agent.personalisation`, which decides, and the training process, which
does the work. What the agent is doing is told to `see`; an assignment, a newer version or a rule
that breaks stops the training at once, and it begins again later from the beginning: it is short.
Nothing that is made here is sent anywhere: the link is not known to this module, and the next round
trains from the version's own weights.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from fedge.edge_agent.data.config import DataConfig
from fedge.edge_agent.example_store import MAX_TEXTS, ExampleStore
from fedge.edge_agent.forgetting import ForgottenMeanwhile, nothing_forgotten
from fedge.edge_agent.library import Library
from fedge.edge_agent.personal_models import PersonalModels, PersonalParts, PersonalRecord
from fedge.edge_agent.personalisation import (
    Begin,
    Material,
    PersonalisationSettings,
    Situation,
    decide,
    seed_for,
)
from fedge.edge_agent.trainer.jobs import CountJob, Personalised, PersonaliseJob, Progressed
from fedge.edge_agent.trainer.process import Trainer, TrainerKilled, TrainingInterrupted
from fedge.edge_agent.typed_texts import TypedTexts
from fedge.edge_agent.usage import UsageMeter
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import FedgeError, LinkError, StoreUnavailable
from fedge.schemas.ids import Digest
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import VersionAnnouncement
from fedge.schemas.plan import PlanManifest

log = EventLog(__name__)

LOOK_EVERY_S = 30.0
"""What an app adds is noticed within this."""
FETCH_S = 30.0
"""For the graph that measures, which no other work of a device needs; then it waits its rest."""

_PASSING = (
    *(TrainingInterrupted, TrainerKilled, ForgottenMeanwhile),
    *(StoreUnavailable, LinkError, TimeoutError),
)
"""What may come to another end when it is tried again."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the agent is doing.

    `active`: the version in use; `held`: the newest that is here. The rest as in `Situation`.
    """

    active: int | None = None
    held: int | None = None
    eligible: bool = False
    busy: bool = True


@dataclass(frozen=True, slots=True)
class _Base:
    """A version to begin from: everything that it takes is here, but perhaps its `eval` graph."""

    version: int
    plan_sha256: Digest
    weights_sha256: Digest
    manifest: PlanManifest


class Personaliser:
    """Personalises for `device` while `run` runs.

    `data`: its examples; `typed`: their store, None for other data. `held`: the newest version that
    is here. `fetch`: brings blobs that are missing. `meter`: is told of the time, None: nobody
    counts it. `changed`: called when a training begins or has ended. `wall_clock`: seconds since
    the epoch, for the record alone.
    """

    def __init__(
        self,
        device: str,
        population: str,
        settings: PersonalisationSettings,
        *,
        data: DataConfig,
        typed: TypedTexts | None,
        threads: int,
        trainer: Trainer,
        library: Library,
        held: Callable[[], VersionAnnouncement | None],
        fetch: Callable[[Iterable[BlobRef]], Awaitable[None]],
        meter: UsageMeter | None,
        changed: Callable[[], None],
        wall_clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._population = population
        self._settings = settings
        self._data = data
        self._typed = typed
        self._threads = threads
        self._trainer = trainer
        self._library = library
        self._models: PersonalModels = library.personal
        self._held = held
        self._fetch = fetch
        self._meter = meter
        self._changed = changed
        self._wall_clock = wall_clock

        self._seen = Seen()
        self._woken = asyncio.Event()
        self._base: _Base | None = None
        self._version: int | None = None
        self._since_s = 0.0
        self._attempts = 0
        self._attempt_s = 0.0
        self._counted: Material | None = None
        self._job: PersonaliseJob | None = None
        self._task: asyncio.Task[Personalised] | None = None
        self._under_way = False
        self._reason = ""

    @property
    def is_training(self) -> bool:
        """Whether a personal training is under way, so that a rule that breaks must stop it.

        One that waits for its turn, in a fleet on one host perhaps for hours, takes nothing yet.
        """
        return self._under_way

    def see(self, seen: Seen) -> None:
        """What the agent is doing from now on. Stops a training that is in the way of it."""
        if seen == self._seen:
            return
        self._seen = seen
        self._woken.set()
        if self._task is None or self._job is None:
            return
        if seen.busy or seen.active != self._version or self._is_outdated(seen):
            # The process stays for what is to be done now.
            self._task.cancel()
        elif not seen.eligible and not self._trainer.interrupt(self._job):
            self._task.cancel()

    def look_again(self, *, forgotten: bool = False) -> None:
        """The examples are others. `forgotten`: what is being made from them would not be kept."""
        self._woken.set()
        if forgotten and self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Decides and trains until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            until_s = loop.time() + LOOK_EVERY_S
            try:
                situation = await self._look()
                decision = decide(self._settings, situation, loop.time())
                if isinstance(decision, Begin):
                    await self._personalise(decision.material)
                    continue
                if not decision.passing:
                    self._say(decision.reason)
                if decision.until_s is not None:
                    until_s = min(until_s, decision.until_s)
            except FedgeError as error:
                # A disk or a store that cannot be used now.
                self._say(str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until_s):
                    await self._woken.wait()

    # ------------------------------------------------------------ looking

    async def _look(self) -> Situation:
        self._base = await asyncio.to_thread(self._find_base)
        version = None if self._base is None else self._base.version
        if version != self._version:
            self._version, self._attempts = version, 0
            self._since_s = asyncio.get_running_loop().time()
        material = None if version is None else await self._material()
        record = await asyncio.to_thread(self._tidy, version, material)
        return Situation(
            version=version,
            since_s=self._since_s,
            eligible=self._seen.eligible,
            busy=self._seen.busy,
            material=material,
            record=record,
            attempts=self._attempts,
            attempt_s=self._attempt_s,
        )

    def _is_outdated(self, seen: Seen) -> bool:
        """Whether a newer version takes the place of the one in use soon.

        Where rollouts say what is in use, what is fetched says nothing about it.
        """
        return not self._library.is_staged and seen.held != seen.active

    def _find_base(self) -> _Base | None:
        """The version in use, if no newer one is on its way and its blobs are here."""
        active, held, blobs = self._library.active(), self._held(), self._library.blobs
        if active is None or self._is_outdated(self._seen):
            return None
        if held is not None and held.number == active.version:
            weights_sha256: Digest | None = held.weights.sha256
        else:
            weights_sha256 = self._library.weights_in_use()
        plan_sha256 = active.manifest.name
        if weights_sha256 is None or not (blobs.has(plan_sha256) and blobs.has(weights_sha256)):
            return None
        manifest = PlanManifest.decode(blobs.read(plan_sha256))
        needed = {ref.sha256 for ref in manifest.blobs} - {manifest.graphs.eval.sha256}
        if not all(blobs.has(digest) for digest in needed):
            return None
        return _Base(active.version, plan_sha256, weights_sha256, manifest)

    async def _material(self) -> Material | None:
        if self._typed is not None:
            # It may wait for an app's transaction.
            return await asyncio.to_thread(_in_store, self._data, self._typed)
        if self._counted is None:
            counts = await self._trainer.run(CountJob(data=self._data))
            self._counted = Material(counts.examples, counts.hold_out)
        return self._counted

    def _tidy(self, version: int | None, material: Material | None) -> PersonalRecord | None:
        """The record, after what must not be there any more is gone."""
        record = self._models.record()
        if record is None:
            return None
        if material is not None and record.generation != material.generation:
            # Whoever forgot has removed it; this is for a store that lies in another folder.
            self._models.forget()
            return None
        if version is not None and record.version != version:
            self._models.sweep(version)
        return record

    # ------------------------------------------------------------ training

    async def _personalise(self, material: Material) -> None:
        base = self._base
        if base is None:
            return
        parts = self._models.parts(base.version)
        self._attempts += 1
        try:
            record = await self._attempt(base, material, parts)
            await asyncio.to_thread(self._keep, record, parts)
            self._attempts = 0
            self._tell(record)
        except _PASSING as error:
            log.info(
                "personal_training_cut_off",
                device=self._device,
                version=base.version,
                attempts=self._attempts,
                reason=str(error) or f"what it needs did not come within {FETCH_S:g} s",
            )
        finally:
            self._attempt_s = asyncio.get_running_loop().time()
            self._models.drop(parts)

    async def _attempt(
        self, base: _Base, material: Material, parts: PersonalParts
    ) -> PersonalRecord:
        """What to write down. Raises what may come to another end when it is tried again."""
        try:
            job = await self._job_for(base, parts)
            done = await self._train(job, base.version)
            self._tell_what_it_took(base, done)
            return self._record(base, material, done)
        except _PASSING:
            raise
        except FedgeError as error:
            if await self._material() != material:
                # A text that was taken back ends the training as an error does.
                raise ForgottenMeanwhile from error
            return self._record(base, material, str(error))

    async def _train(self, job: PersonaliseJob, version: int) -> Personalised:
        seen = self._seen
        wanted = seen.active == version and not self._is_outdated(seen)
        if seen.busy or not seen.eligible or not wanted:
            # While the graph was fetched.
            raise TrainingInterrupted(0, 0, kept=False)
        self._job = job
        work = self._trainer.run(job, self._progressed)
        self._task = asyncio.create_task(work, name=f"personal-{version}-{self._device}")
        try:
            return await self._task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            # It was `see` that cancelled the training.
            raise TrainingInterrupted(0, 0, kept=False) from None
        finally:
            self._task = self._job = None
            self._ended()

    async def _job_for(self, base: _Base, parts: PersonalParts) -> PersonaliseJob:
        manifest = base.manifest
        graphs, words = manifest.graphs, manifest.vocabulary
        if not self._library.blobs.has(graphs.eval.sha256):
            self._library.make_room_to_measure([graphs.eval], self._held())
            # Downloads take turns, and a version that is announced meanwhile waits for this one.
            async with asyncio.timeout(FETCH_S):
                await self._fetch([graphs.eval])
        path = self._library.blobs.path
        seed = seed_for(self._population, self._device, base.version)
        return PersonaliseJob(
            manifest=path(base.plan_sha256),
            train_graph=path(graphs.train.sha256),
            eval_graph=path(graphs.eval.sha256),
            infer_graph=path(graphs.infer.sha256),
            weights=path(base.weights_sha256),
            golden_inputs=path(manifest.golden.sha256),
            vocabulary=None if words is None else path(words.sha256),
            data=self._data,
            limits=None if self._typed is None else self._typed.limits,
            settings=self._settings.training(manifest.defaults, seed),
            layers=self._settings.layers,
            weights_output=parts.weights,
            model_output=parts.model,
            threads=self._threads,
        )

    def _keep(self, record: PersonalRecord, parts: PersonalParts) -> None:
        limits = None if self._typed is None else self._typed.limits
        with nothing_forgotten(self._data, limits, record.generation):
            self._models.keep(record, parts)

    def _record(
        self, base: _Base, material: Material, came_to: Personalised | str
    ) -> PersonalRecord:
        """`came_to`: what it came to, or why it failed."""
        record = PersonalRecord(
            version=base.version,
            plan_sha256=base.plan_sha256,
            settings_sha256=self._settings.digest,
            training=material.training,
            hold_out=material.hold_out,
            generation=material.generation,
            at=self._wall_clock(),
            outcome="failed",
        )
        if isinstance(came_to, str):
            return record.model_copy(update={"reason": came_to[:1000]})
        return record.model_copy(
            update={
                "outcome": "not better" if came_to.weights_sha256 is None else "better",
                "generation": came_to.generation,
                "steps": came_to.steps,
                "training_s": came_to.training_s,
                "common": came_to.common,
                "personal": came_to.personal,
                "weights_sha256": came_to.weights_sha256,
            }
        )

    # ------------------------------------------------------------ its time

    def _progressed(self, progress: Progressed) -> None:
        if self._task is None:
            return
        if self._under_way:
            if self._meter is not None:
                self._meter.goes_on()
            return
        # Its turn has come.
        self._under_way = True
        log.info("personal_training", device=self._device, version=self._version)
        if self._meter is not None:
            self._meter.begin()
        self._changed()

    def _ended(self) -> None:
        if not self._under_way:
            return
        self._under_way = False
        if self._meter is not None:
            self._meter.end()
        self._changed()

    # ------------------------------------------------------------ saying

    def _tell_what_it_took(self, base: _Base, done: Personalised) -> None:
        log.info(
            "personal_trained",
            device=self._device,
            version=base.version,
            examples=done.examples,
            steps=done.steps,
            training_s=done.training_s,
            evaluation_s=done.evaluation_s,
            peak_rss_bytes=done.peak_rss_bytes,
        )

    def _tell(self, record: PersonalRecord) -> None:
        common, personal = record.common, record.personal
        log.info(
            "personal_model",
            device=self._device,
            version=record.version,
            outcome=record.outcome,
            reason=record.reason or None,
            held_out=None if common is None else common.examples,
            loss=None if common is None else common.loss_sum / common.rows,
            personal_loss=None if personal is None else personal.loss_sum / personal.rows,
            training_s=record.training_s,
        )

    def _say(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            log.info("personal_waits", device=self._device, reason=reason)


def _in_store(data: DataConfig, typed: TypedTexts) -> Material:
    with ExampleStore(data.path, typed.limits) as store:
        counts = store.count()
    most = data.limit or MAX_TEXTS
    return Material(
        training=min(counts.training.examples, most),
        hold_out=min(counts.hold_out.examples, most),
        generation=counts.generation,
    )
