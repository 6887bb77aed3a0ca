"""What answers now: the one place that says which model this device predicts with.

`fedge-agent predict` opens it once; the service for apps and the keyboard in the terminal follow it
while they run. Whether that is the version in use or this device's own model of it is the library's
to say; that a model is loaded whole before the one before it is let go is settled here. Each answer
names the version that gave it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.edge_agent.durable import disk
from fedge.edge_agent.library import Active, Library
from fedge.schemas.closing import Closing
from fedge.schemas.errors import FedgeError, StoreError
from fedge.schemas.logs import EventLog
from fedge.schemas.plan import PlanManifest

if TYPE_CHECKING:
    from fedge.edge_agent.predictor import Prediction, Predictor, RawExample

# The predictor and its runtime are imported when a model is opened: an agent that is never asked
# stays small.

log = EventLog(__name__)

TRY_AGAIN_S = 30.0
"""After a version that could not be loaded, while another one answers."""
_LOOKS = 3
"""A version may be replaced, and its file deleted, between reading its name and opening it."""


class NothingToServe(StoreError):  # noqa: N818 -- a state, which passes
    """No version is in use on this device yet."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """What tells one active model from another, also where a file was replaced under its name."""

    active: Active
    file: tuple[int, int, int]

    def is_there(self) -> bool:
        """Whether its file is still the one that was opened; also if nobody can look now."""
        try:
            return _identity(self.active.model) == self.file
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True


@dataclass(frozen=True, slots=True)
class Serving:
    """A model that is loaded, and what is needed to ask it."""

    version: int
    manifest: PlanManifest
    predictor: Predictor
    mark: _Mark

    @property
    def personal(self) -> bool:
        """Whether it is this device's own, made from that version."""
        return self.mark.active.personal


@dataclass(frozen=True, slots=True)
class Answer:
    """A prediction and the version that made it. `personal`: as in `Serving`."""

    version: int
    prediction: Prediction
    personal: bool = False


def open_serving(library: Library, before: Serving | None = None) -> Serving:
    """The model that the library calls active, loaded.

    `before`: one that was opened before, whose vocabulary is used again where the plan is the same.
    Raises `NothingToServe` if there is none, `StoreError` if its files cannot be read, and
    `PlanRefused` if the runtime cannot load it.
    """
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(StoreError):
            return _opened(library, _mark_of(library), before)
    return _opened(library, _mark_of(library), before)


def _opened(library: Library, mark: _Mark | None, before: Serving | None) -> Serving:
    if mark is None:
        raise NothingToServe(
            "no version is in use yet: run `fedge-agent run` until one was fetched"
        )
    from fedge.edge_agent.predictor import Predictor  # noqa: PLC0415 -- see the top of the file

    active = mark.active
    if before is not None and before.mark.active.manifest == active.manifest:
        manifest, vocabulary = before.manifest, before.predictor.vocabulary
    else:
        manifest = PlanManifest.decode(library.blobs.read(active.manifest.name))
        vocabulary = library.vocabulary(manifest)
    predictor = Predictor(active.model, manifest, vocabulary)
    return Serving(active.version, manifest, predictor, mark)


def _mark_of(library: Library) -> _Mark | None:
    active = library.serving()
    if active is None:
        return None
    with disk(f"look at {active.model}"):
        return _Mark(active, _identity(active.model))


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _give_memory_back() -> None:
    """What the old model and the loading of the new one left; glibc would keep most of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Served(Closing):
    """Predictions with the model that is active at the moment, loaded at the first question.

    Where another one has become active, it is loaded beside the one that answers, in a thread of
    its own, and takes its place when it can answer; if it cannot be loaded, the old one stays and
    it is tried again `TRY_AGAIN_S` later. `replaced`: called from that thread with the number of a
    version that took over. Any thread may ask.

    A personal model whose file is gone answers no question more, whatever can be loaded instead: a
    forget removes it, and then it was learned from a text that somebody took back.
    """

    def __init__(
        self,
        library: Library,
        *,
        replaced: Callable[[int], None] = lambda version: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._library = library
        self._replaced = replaced
        self._clock = clock
        self._lock = threading.Lock()
        self._current: Serving | None = None
        self._loading: threading.Thread | None = None
        self._failed: tuple[_Mark, float] | None = None
        self._closed = False

    @property
    def loaded(self) -> Serving | None:
        """What answers now; None before the first question."""
        return self._current

    def predict(self, raw: RawExample, *, top: int = 3) -> Answer:
        """The answer for one example.

        Raises as `open_serving` while nothing is loaded; `ConfigError` if `raw` is not what the
        task takes, `PlanRefused` if the model fails.
        """
        serving = self.serving()
        answer = serving.predictor.predict(raw, top=top)
        return Answer(serving.version, answer, serving.personal)

    def serving(self) -> Serving:
        """What answers now, opened if it was not; begins to load what is newer.

        Raises as `open_serving`, while nothing is loaded, or a personal model was taken back.
        """
        current = self._current
        if current is not None:
            return self._follow(current)
        with self._lock:
            if self._current is None:
                self._current = open_serving(self._library)
                log.info("model_loaded", version=self._current.version)
            return self._current

    def look(self) -> None:
        """What is active may have changed: nobody should have to ask to find that out.

        Does nothing before the first question. Blocks for a moment.
        """
        current = self._current
        if current is not None:
            with contextlib.suppress(FedgeError):
                self._follow(current)

    def close(self) -> None:
        """Waits for a loading under way, which is short, and lets go of the model."""
        with self._lock:
            self._closed = True
            loading = self._loading
        if loading is not None:
            loading.join()
        self._current = None

    def _follow(self, current: Serving) -> Serving:
        """What answers this question; begins to load what is newer."""
        if current.personal and not current.mark.is_there():
            # Before the record is read, which may be damaged.
            return self._without(current)
        try:
            mark = _mark_of(self._library)
        except FedgeError:
            # The record is damaged or the disk away: what is in memory answers.
            return current
        if mark is None or mark == current.mark:
            return current
        with self._lock:
            failed = self._failed
            waits = failed is not None and failed[0] == mark and self._clock() < failed[1]
            if self._loading is not None or self._closed or waits:
                return current
            self._loading = threading.Thread(target=self._load, args=(mark,), name="load-version")
            self._loading.start()
        return current

    def _without(self, taken_back: Serving) -> Serving:
        """What is active now, at once: what was learned from a forgotten text answers no more."""
        with self._lock:
            if self._current is taken_back:
                # Also if nothing can be opened: then there is no answer.
                self._current = None
            if self._current is None:
                self._current = open_serving(self._library, taken_back)
                log.info("model_loaded", version=self._current.version, before="personal")
            return self._current

    def _load(self, mark: _Mark) -> None:
        before = self._current
        number = None if before is None else before.version
        try:
            found = open_serving(self._library, before)
        except FedgeError as error:
            self._failed = (mark, self._clock() + TRY_AGAIN_S)
            log.warning(
                "model_not_loaded", version=mark.active.version, still=number, reason=str(error)
            )
        else:
            self._failed = None
            self._current = found
            # The last to hold it, unless it answers at this moment.
            del before
            _give_memory_back()
            log.info("model_loaded", version=found.version, before=number)
            self._replaced(found.version)
        finally:
            with self._lock:
                self._loading = None
