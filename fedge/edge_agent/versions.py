"""The versions of one device: fetched when they are announced, checked, put into use.

What the machine asked for is done here, with the disk that there is: a fetch waits for a disk that
is full, and goes on from the chunks that it has. A version that cannot be had is reported to the
coordinator. Which version is wanted, and when, is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from fedge.edge_agent.cache import CacheTooSmall
from fedge.edge_agent.download import Downloads
from fedge.edge_agent.events import Activated, Event, Fetched, FetchFailed, Outlook
from fedge.edge_agent.library import Active, Library
from fedge.edge_agent.state import AgentState
from fedge.edge_agent.storage_watch import StorageWatch
from fedge.edge_agent.trainer.process import Trainer
from fedge.schemas.blobs import BlobRef
from fedge.schemas.errors import FedgeError, StoreError, StoreUnavailable
from fedge.schemas.logs import EventLog
from fedge.schemas.messages import PublishedVersion, Report, ReportKind, VersionAnnouncement
from fedge.schemas.plan import PlanManifest

log = EventLog(__name__)

MOMENT_S = 20.0
"""For so long an older version that is published is taken for a broker's memory."""

NEWEST, ROLLOUT = "newest", "rollout"
"""What blobs are pinned for: the version that rounds need, and one that a rollout is about."""


class Versions:
    """The versions of `device`. `held`: the newest one whose blobs are all here.

    `feed`: takes what happened. `report`: tells the coordinator, returns when the broker has it.
    """

    def __init__(
        self,
        device: str,
        *,
        library: Library,
        downloads: Downloads,
        memory: AgentState,
        trainer: Trainer,
        storage: StorageWatch,
        feed: Callable[[Event], None],
        report: Callable[[Report], Awaitable[None]],
    ) -> None:
        self._device = device
        self._library = library
        self._downloads = downloads
        self._memory = memory
        self._trainer = trainer
        self._storage = storage
        self._feed = feed
        self._report = report
        self._swept = False
        self._heard: VersionAnnouncement | None = None
        self._complained_of: int | None = None
        self.held: VersionAnnouncement | None = None

    # ------------------------------------------------------------ the start

    def recover(self) -> Active | None:
        """Finds out what is here and returns what is in use; what a crash left is cleared.

        What is damaged is treated as absent: it is fetched or made again.
        """
        self._storage.attempt("sweep", self._library.sweep)
        try:
            active = self._library.active()
        except StoreError as error:
            log.error("active_version_lost", device=self._device, reason=str(error))
            active = None
        known = self._memory.announcement()
        try:
            self.held = known if known is not None and self._library.holds(known) else None
        except FedgeError as error:
            log.error("version_lost", device=self._device, reason=str(error))
        return active

    async def complain(self, published: VersionAnnouncement, seen: int) -> None:
        """Says that an older version than one that was seen is published, if it stays so.

        A broker that comes back may remember an older one for a moment. Numbers never go back, so
        the device waits for a higher one: only somebody at the coordinator can change that.
        """
        await asyncio.sleep(MOMENT_S)
        still = self._heard is not None and self._heard.number == published.number
        if not still or self._complained_of == published.number:
            return
        self._complained_of = published.number
        detail = (
            f"version {published.number} is published, and this device has seen {seen}: restore "
            "the coordinator with a larger --gap, or begin anew with a population of another name"
        )
        log.warning("version_ignored", device=self._device, version=published.number, reason=detail)
        await self._report(Report(kind=ReportKind.VERSION_IGNORED, version=seen, detail=detail))

    def announced(self, version: VersionAnnouncement) -> None:
        """The coordinator's newest version is known: what an older download left goes.

        It could not go at the start, because it might have been this version's. If this version is
        to be fetched, `fetch` does the same.
        """
        self._heard = version
        held = self.held
        if held is not None and held.number == version.number and held.staged != version.staged:
            # What it is for has changed, and nothing else: there is nothing to fetch.
            self.held = version
            self._storage.attempt("announcement", lambda: self._memory.keep_announcement(version))
        if not self._swept and self.held is not None and version.number == self.held.number:
            self._swept = True
            held = self.held
            self._storage.attempt("sweep", lambda: self._library.make_room(held, None))

    # ------------------------------------------------------------ fetching

    async def fetch(self, version: VersionAnnouncement) -> None:
        """Fetches what is missing of a version, however long it takes; then feeds `Fetched`.

        Feeds `FetchFailed` if it cannot be had, and reports it. Cancel it to give up.
        """

        def blocked(error: StoreUnavailable) -> None:
            self._feed(FetchFailed(version.number, str(error), Outlook.UNDER_WAY))

        try:
            await self._storage.until_done("blobs", lambda: self._bring(version), blocked)
        except FedgeError as error:
            final = isinstance(error, CacheTooSmall)
            outlook = Outlook.NEVER if final else Outlook.WHEN_ANNOUNCED_AGAIN
            self._feed(FetchFailed(version.number, str(error), outlook))
            await self._refused(version, error)
            return
        self.held = version
        log.info(
            "version_fetched",
            device=self._device,
            version=version.number,
            received_bytes=self._downloads.received_bytes,
        )
        self._feed(Fetched(version.number))
        await self._storage.until_done("announcement", lambda: self._keep(version))

    async def _bring(self, version: VersionAnnouncement) -> None:
        self._swept = True
        self._library.pin(NEWEST, self._library.refs_of(version))
        self._library.make_room(version, self._in_hand(), gives_way=ROLLOUT)
        manifest = await self._manifest(version.plan, for_a_round=True)
        # Now the sizes of its graphs are known, too.
        self._library.pin(NEWEST, self._library.refs_of(version))
        self._library.make_room(version, self._in_hand(), gives_way=ROLLOUT)
        await self._downloads.fetch(self._library.needed(version, manifest), for_a_round=True)

    async def bring(
        self, version: PublishedVersion, beside: Iterable[BlobRef] = ()
    ) -> PlanManifest:
        """Fetches what using and measuring a version takes, and `beside`; beside the newest one.

        All of it stays until `let_go`, which is the caller's to call, whatever becomes of this.
        Raises as `Library.make_room` and `Downloads.fetch`. Called again, it goes on.
        """
        more = tuple(beside)
        self._library.pin(ROLLOUT, (*self._library.refs_of(version), *more))
        self._library.make_room(version, self._in_hand())
        manifest = await self._manifest(version.plan)
        refs = (*self._library.needed(version, manifest), manifest.graphs.eval, *more)
        self._library.pin(ROLLOUT, (version.plan, *refs))
        self._library.make_room(version, self._in_hand())
        await self._downloads.fetch(refs)
        return manifest

    def let_go(self) -> None:
        """What `bring` has brought may go."""
        self._library.pin(ROLLOUT, ())

    def _in_hand(self) -> VersionAnnouncement | None:
        if self.held is not None:
            try:
                if self._library.holds(self.held):
                    return self.held
            except StoreUnavailable:
                raise
            except FedgeError as error:
                log.error("version_lost", device=self._device, reason=str(error))
        self.held = None
        return None

    async def _manifest(self, plan: BlobRef, *, for_a_round: bool = False) -> PlanManifest:
        await self._downloads.fetch([plan], for_a_round=for_a_round)
        try:
            return self._library.manifest(plan)
        except StoreUnavailable:
            raise
        except StoreError as error:
            log.error("blob_damaged", device=self._device, reason=str(error))
        await self._downloads.fetch([plan], for_a_round=for_a_round)
        return self._library.manifest(plan)

    async def _keep(self, version: VersionAnnouncement) -> None:
        self._memory.keep_announcement(version)

    # ------------------------------------------------------------ putting into use

    async def activate(self, version: VersionAnnouncement) -> None:
        """Makes the version's model, checks it and puts it into use; then feeds `Activated`.

        A newer one that was fetched meanwhile takes its place: where versions come faster than a
        device can check one, it would never use any. A version that fails its checks is reported
        and the one before stays.
        """
        wanted = version
        while True:
            if self._heard is not None and self._heard.staged:
                # Since it was asked for, the fleet has changed to rollouts.
                return
            if self.held is not None and self.held.number > wanted.number:
                wanted = self.held
            try:
                made = await self._storage.until_done("model", partial(self._put_into_use, wanted))
            except FedgeError as error:
                if self.held is not None and self.held.number > wanted.number:
                    # While it waited for its turn, a newer one came and it was cleared away.
                    continue
                await self._refused(wanted, error)
                return
            if made:
                self._feed(Activated(wanted.number))
                await self._report(Report(kind=ReportKind.ACTIVATED, version=wanted.number))
            return

    async def _put_into_use(self, version: VersionAnnouncement) -> bool:
        held_number = None if self.held is None else self.held.number
        if held_number != version.number or self._active_number() == version.number:
            # It was done before, or a newer one was fetched while the disk was full.
            return False
        activated = await self._trainer.run(self._library.activation_of(version))
        if self._heard is not None and self._heard.staged:
            # Meanwhile the fleet has changed to rollouts.
            return False
        await asyncio.to_thread(self._library.activate, version)
        log.info(
            "version_activated",
            device=self._device,
            version=version.number,
            latency_ms=activated.latency_ms,
            largest_difference=activated.largest_difference,
        )
        return True

    def _active_number(self) -> int | None:
        try:
            active = self._library.active()
        except StoreError:
            return None
        return None if active is None else active.version

    async def _refused(self, version: VersionAnnouncement, error: FedgeError) -> None:
        log.error("version_refused", device=self._device, version=version.number, reason=str(error))
        await self._report(
            Report(
                kind=ReportKind.ACTIVATION_FAILED, version=version.number, detail=str(error)[:500]
            )
        )
