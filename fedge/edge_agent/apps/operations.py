"""What the service does for an app: keep texts, forget them, count them, answer, tell.

Short work of the disk and of the model, each in a thread of its own, so that a suggestion never
waits for a disk and neither stops the network. The example store is opened for each call, as every
other program does: whatever happens to its files, an app's text is in the ones that training reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from fedge.edge_agent.apps import contract
from fedge.edge_agent.apps.admission import Name, Operation
from fedge.edge_agent.apps.connection import Reply
from fedge.edge_agent.apps.openapi import description
from fedge.edge_agent.apps.refusals import Refused, refusal_of, refusal_of_json
from fedge.edge_agent.example_limits import ExampleLimits
from fedge.edge_agent.example_store import Counts, ExampleStore, Typed
from fedge.edge_agent.serving import Served
from fedge.schemas.closing import Closing
from fedge.schemas.errors import ConfigError, FedgeError, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog

if TYPE_CHECKING:
    from fedge.edge_agent.predictor import RawExample

log = EventLog(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Tell = Callable[[contract.KeptTexts | None, int | None], contract.Status]
"""The texts that are kept, None if nobody can say, and the version in use → the status."""


class Operations(Closing):
    """What `[apps]` offers.

    `examples`: the file of the example store, with its `limits`. `tell`: see `Tell`; called on the
    event loop. `changed`: called there, too, when texts were added or forgotten.
    """

    def __init__(
        self,
        examples: Path,
        limits: ExampleLimits,
        served: Served,
        *,
        in_use: Callable[[], int | None],
        tell: Tell,
        changed: Callable[[], None],
    ) -> None:
        self._examples = examples
        self._limits = limits
        self._served = served
        self._in_use = in_use
        self._tell = tell
        self._changed = changed
        self._disk = ThreadPoolExecutor(1, "apps-disk")
        self._model = ThreadPoolExecutor(1, "apps-model")

    async def perform(self, operation: Operation, body: bytes) -> Reply:
        """Does what is asked. Raises `Refused`."""
        try:
            answer = await self._answer(operation, body)
        except FedgeError as error:
            raise refusal_of(error) from error
        encoded = answer if isinstance(answer, bytes) else answer.model_dump_json().encode()
        return Reply(operation.status, encoded)

    def look(self) -> None:
        """Another model may be in use now. Blocks for a moment."""
        self._served.look()

    def close(self) -> None:
        """Waits for what is under way."""
        self._disk.shutdown()
        self._model.shutdown()
        self._served.close()

    async def _answer(self, operation: Operation, body: bytes) -> BaseModel | bytes:
        match operation.name:
            case Name.ADD:
                return await self._add(_parsed(contract.NewExamples, body))
            case Name.FORGET:
                return await self._forget(_parsed(contract.WhatToForget, body))
            case Name.COUNT:
                return await self._in(self._disk, self._count)
            case Name.PREDICT:
                question = _parsed(contract.Question, body)
                return await self._in(self._model, lambda: self._predict(question))
            case Name.STATUS:
                return self._tell(*await self._in(self._disk, self._known))
            case Name.DESCRIBE:
                return json.dumps(description()).encode()

    @staticmethod
    async def _in(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    # ------------------------------------------------------------ examples

    async def _add(self, asked: contract.NewExamples) -> contract.Added:
        texts = [Typed(text) for text in asked.texts or ()]
        if asked.text is not None:
            texts = [Typed(asked.text, asked.at)]
        ids = await self._in(self._disk, lambda: self._with_store(lambda s: s.add_all(texts)))
        self._changed()
        return contract.Added(ids=ids)

    async def _forget(self, asked: contract.WhatToForget) -> contract.Forgotten:
        def forget(store: ExampleStore) -> contract.Forgotten:
            if asked.ids is not None:
                done = store.forget_ids(asked.ids)
            elif asked.containing is not None:
                done = store.forget_containing(asked.containing)
            elif asked.before is not None:
                done = store.forget_before(asked.before)
            else:
                done = store.forget_all()
            return contract.Forgotten(**asdict(done))

        def work() -> contract.Forgotten:
            try:
                return self._with_store(forget)
            except StoreUnavailable:
                raise
            except StoreError as error:
                if not asked.all:
                    raise
                # Too damaged to be asked, or of a newer release; the wish holds all the same.
                log.warning("examples_deleted", reason=str(error))
                ExampleStore.remove(self._examples)
                return self._with_store(forget)

        done = await self._in(self._disk, work)
        self._changed()
        return done

    def _count(self) -> contract.ExampleCounts:
        counts: Counts = self._with_store(lambda store: store.count())
        return contract.ExampleCounts.model_validate(asdict(counts))

    def _with_store(self, work: Callable[[ExampleStore], T]) -> T:
        with ExampleStore(self._examples, self._limits) as store:
            return work(store)

    # ------------------------------------------------------------ answers

    def _predict(self, question: contract.Question) -> BaseModel:
        raw: RawExample
        if question.text is not None:
            raw = question.text
        elif question.image is not None:
            raw = question.image
        else:
            raw = question.row or []
        # A version that cannot be opened is the agent's fault, an example that does not fit is not.
        serving = self._served.serving()
        try:
            found = serving.predictor.predict(raw, top=question.top)
        except ConfigError as error:
            raise Refused(422, "wrong_example", str(error)) from error
        said = {"version": serving.version, "personal": serving.personal, **found.as_dict()}
        kind = next(
            one
            for one in (contract.Words, contract.Classes, contract.Values)
            if one.model_fields.keys() == said.keys()
        )
        try:
            return kind.model_validate(said, strict=False)
        except ValidationError as error:
            raise Refused(
                422, "wrong_example", "the model has no finite answer for this example"
            ) from error

    # ------------------------------------------------------------ the status

    def _known(self) -> tuple[contract.KeptTexts | None, int | None]:
        kept: contract.KeptTexts | None = contract.KeptTexts(training=0, hold_out=0)
        try:
            # A device that nobody gave a text has no store, and does not get one from being asked.
            if self._examples.exists():
                counts = self._with_store(lambda store: store.count())
                kept = contract.KeptTexts(
                    training=counts.training.examples, hold_out=counts.hold_out.examples
                )
        except (StoreError, OSError) as error:
            log.warning("examples_not_counted", reason=str(error))
            kept = None
        return kept, self._in_use()


def _parsed(kind: type[M], body: bytes) -> M:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of_json(error) from error
